"""examples/dropin: layers and penalty in models of other people, and scripts that say what they need."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dsc_ops
from examples import dropin
from examples.dropin import ddp, lightning_module, resnet_stem, segmentation, timm_globs

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    resnet_stem: "torchvision",
    segmentation: "segmentation_models_pytorch",
    timm_globs: "timm",
    lightning_module: "lightning",
}


def needs(name: str):
    """The package, or a skip; one that is there and does not import fails."""
    return pytest.importorskip(name, reason="it needs pip install dsc_ops[dropin]", exc_type=ModuleNotFoundError)


def printed(capsys, script, *arguments: str) -> dict[str, list[str]]:
    """The rows of the table that a fast run prints, by their names."""
    assert script.main(["--fast", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[2:30].strip(): line[30:].split("  ") for line in lines if line.startswith("  ")}


def values(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells if cell.strip()]


# --- the models -------------------------------------------------------------------------------------------------------


def test_resnet_takes_a_stem_of_lista():
    models = needs("torchvision.models")
    stock, changed = models.resnet18(weights=None), models.resnet18(weights=None)
    others = {name for name in stock.state_dict() if not name.startswith(("conv1.", "bn1."))}
    stem = resnet_stem.replace_stem(changed)
    assert {name for name in changed.state_dict() if not name.startswith("conv1.")} == others
    images = torch.randn(2, 3, 65, 50)  # sizes that the stride does not divide
    assert stem(images).shape == stock.conv1(images).shape
    assert float(dsc_ops.functional.density(stem(images))) < 0.5 and float(stem(images).detach().min()) == 0
    changed.eval()(images).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in stem.parameters())


def test_resnet_example_tells_what_changed(capsys):
    needs("torchvision")
    rows = printed(capsys, resnet_stem)
    stock, changed = values(rows["of these in the stem"])
    assert stock == 64 * 3 * 49 + 2 * 64 and changed == 64 * 3 * 49 * 4 + 3 * 64
    assert values(rows["parameters"])[1] - values(rows["parameters"])[0] == changed - stock
    shapes = [cell.strip() for cell in rows["shape after the stem"] if cell.strip()]
    assert shapes == ["(64, 24, 24)"] * 2
    assert values(rows["density after the stem"])[1] < values(rows["density after the stem"])[0]


def test_penalty_thins_the_features_of_a_segmentation_model(capsys):
    needs("segmentation_models_pytorch")
    rows = printed(capsys, segmentation, "--gamma", "100")
    names = [name for name in rows if name.startswith("decoder")]
    assert names == [f"decoder.blocks.{n}.conv2" for n in range(5)]
    without, sparse = zip(*(values(rows[name]) for name in names), strict=True)
    assert sum(sparse) < sum(without)
    assert all(0 <= value <= 1 for value in values(rows["overlap"]))


def test_penalty_finds_layers_of_a_timm_model_by_glob(capsys):
    timm = needs("timm")
    rows = printed(capsys, timm_globs, "--layers", "layer[13].*.act1", "--gamma", "100")
    modules = dict(timm.create_model("resnet18", pretrained=False).named_modules())
    expected = [f"layer{n}.{block}.act1" for n in (1, 3) for block in (0, 1)]
    assert [name for name in rows if name.startswith("layer")] == expected and set(expected) <= set(modules)
    without, sparse = zip(*(values(rows[name]) for name in expected), strict=True)
    assert sum(sparse) < sum(without)


@pytest.mark.filterwarnings("ignore")
def test_lightning_module_logs_densities_and_loads_its_checkpoint(capsys):
    needs("lightning")
    rows = printed(capsys, lightning_module)
    assert {"loss", "accuracy", "density/0", "density/3"} < set(rows)
    assert 0 < values(rows["density/0"])[0] < 1
    assert "yes" in rows["the checkpoint says the same"][-1]


def torchrun(processes: int, folder: Path, *arguments: str) -> dict[str, float]:
    """The table of a run under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [*command, "-m", "examples.dropin.ddp", "--fast", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    return {line[2:30].strip(): float(line[30:]) for line in lines}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_learn_what_plain_pytorch_learns(tmp_path):
    """Each has half of every batch; the mean over the batch makes their losses and steps those of the whole."""
    told = torchrun(2, tmp_path, "--gamma", "3")
    torch.manual_seed(0)
    model = ddp.make_model()
    penalty = dsc_ops.SparsityPenalty(model, ["0", "2"], gamma=3.0)
    losses = dropin.train(
        lambda x, y: nn.functional.cross_entropy(model(x), y) + penalty(),
        model.parameters(),
        lambda number: dropin.stripes(ddp.BATCH, 32, number),
        5,
    )
    assert told["weights differ by"] == 0
    assert told["loss of the first step"] == pytest.approx(losses[0], abs=2e-5)
    assert told["loss of the last step"] == pytest.approx(losses[-1], abs=2e-4) != losses[0]
    assert 0 < told["density of layer 0"] < 1


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dropin.stripes, dropin.discs])
def test_pictures_depend_on_the_seed_alone(make):
    images, targets = make(12, 24, 5)
    assert images.shape == (12, 3, 24, 24) and len(targets) == 12
    assert all(map(torch.equal, make(12, 24, 5), (images, targets)))
    assert not torch.equal(make(12, 24, 6)[0], images)


def test_training_lowers_the_loss():
    images, labels = dropin.stripes(16, 16, 0)
    layers = [dsc_ops.LISTAConv(3, 16, 5, one_sided=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)]
    model = nn.Sequential(*layers)
    losses = dropin.train(
        lambda x, y: nn.functional.cross_entropy(model(x), y), model.parameters(), lambda number: (images, labels), 20
    )
    assert len(losses) == 20 and losses[-1] < losses[0]


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*SCRIPTS, ddp], ids=lambda script: script.__name__.rpartition(".")[2])
def test_help_explains(script, capsys):
    """Also where the script's packages are missing."""
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and f"usage: python -m {script.__name__}" in said
    assert "--fast" in said and "Prints" in said


@pytest.mark.parametrize(("script", "package"), SCRIPTS.items(), ids=SCRIPTS.values())
def test_a_missing_package_is_named_with_what_to_install(script, package, monkeypatch):
    monkeypatch.setattr(dropin, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(SystemExit, match=rf"needs {package}, not installed here: pip install dsc_ops\[dropin\]"):
        script.main(["--fast"])


def test_ddp_without_torchrun_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2 -m examples.dropin.ddp"):
        ddp.main(["--fast"])


def test_the_gallery_is_listed():
    listed = (ROOT / "docs" / "examples.md").read_text()
    scripts = sorted(path.stem for path in (ROOT / "examples" / "dropin").glob("[a-z]*.py"))
    assert scripts == sorted(script.__name__.rpartition(".")[2] for script in (*SCRIPTS, ddp))
    for name in scripts:
        assert f"-m examples.dropin.{name}`" in listed
        assert importlib.import_module(f"examples.dropin.{name}").main
