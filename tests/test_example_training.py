"""examples.train, .experiments, .report, .throughput: the papers' networks, their training, resumed and shared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("jsonargparse", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("lightning", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("matplotlib", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("skimage", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("tensorboard", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("torchmetrics", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("torchvision", reason="the examples need pip install dsc_ops[examples]")

from PIL import Image
from torch import nn

import dsc_ops
from benchmarks.machine import commit
from benchmarks.timing import torch_threads
from examples import experiments, paper_figures, report, throughput, train
from examples.cli import CLI, CONFIGS
from examples.data.cifar import CIFAR10
from examples.metrics import MaskScores, mask_scores
from examples.networks import VGG11, LeNet5, UNet

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, LIMIT, BATCH = 3, 64, 16
STEPS = LIMIT // BATCH

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return outputs * (inputs * kernel**2 + 1)


def dense(inputs: int, outputs: int) -> int:
    return outputs * (inputs + 1)


# ------------------------------------------------------------------------------------------------------------ networks


def test_lenet_and_vgg_have_the_parameters_of_the_paper():
    lenet = conv(3, 6, 5) + conv(6, 16, 5) + dense(16 * 5 * 5, 120) + dense(120, 84) + dense(84, 10)
    assert count(LeNet5()) == lenet
    channels = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    pairs = list(zip(channels, channels[1:], strict=False))
    assert count(VGG11()) == sum(conv(a, b, 3) + 2 * b for a, b in pairs) + dense(512, 10)


@pytest.mark.parametrize("activation", ["relu", "elu", "mish"])
@pytest.mark.parametrize("first", ["conv", "lista"])
def test_networks_classify_or_segment_with_each_activation(activation, first):
    images = torch.randn(2, 3, 32, 32)
    for network in (LeNet5(activation=activation, first=first), VGG11(width=0.1, activation=activation, first=first)):
        assert network(images).shape == (2, 10)
    unet = UNet(width=2, activation=activation, first=first)
    assert unet(torch.randn(2, 3, 48, 32)).shape == (2, 1, 48, 32)
    kinds = {type(module) for network in (unet,) for module in network.modules()}
    assert {"relu": nn.ReLU, "elu": nn.ELU, "mish": nn.Mish}[activation] in kinds


def shapes(network: nn.Module, images: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of what each feature returns."""
    found = {}
    for name in network.FEATURES:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: tuple(output.shape)})
        )
    network(images)
    return found


def test_a_lista_block_is_a_drop_in():
    images = torch.randn(2, 3, 32, 32)
    for make in (LeNet5, lambda **o: VGG11(width=0.1, **o), lambda **o: UNet(width=2, **o)):
        plain, lista = make(), make(first="lista")
        first = plain.BLOCKS[0]
        assert isinstance(lista.get_submodule(first), dsc_ops.LISTAConv)
        assert shapes(plain, images) == shapes(lista, images)
        rest = [{n for n in network.state_dict() if not n.startswith(f"{first}.")} for network in (plain, lista)]
        assert rest[0] == rest[1]


def test_unet_has_five_encoders_and_four_decoders_that_take_them():
    unet = UNet(width=2)
    sizes = shapes(unet, torch.randn(1, 3, 32, 32))
    assert sizes == {f"encoder{k + 1}": (1, 2 * 2**k, 32 // 2**k, 32 // 2**k) for k in range(5)}
    children = {name for name, _ in unet.named_children()}
    assert {name for name in children if name.startswith("decoder")} == {f"decoder{k}" for k in range(1, 5)}
    assert unet.BLOCKS == tuple(f"encoder{k}" for k in range(1, 5))


def test_the_first_encoder_reaches_the_masks_past_all_others():
    unet, images = UNet(width=2).eval(), torch.randn(2, 1, 3, 32, 32)
    nn.init.zeros_(unet.up1.weight)
    with torch.no_grad():
        assert not torch.equal(unet(images[0]), unet(images[1]))
        nn.init.zeros_(unet.decoder1[0].conv.weight[:, :2])
        assert torch.equal(unet(images[0]), unet(images[1]))


def test_networks_refuse_what_they_cannot_take():
    with pytest.raises(ValueError, match=r"activation is 'tanh', it takes one of relu, elu, mish"):
        LeNet5(activation="tanh")
    with pytest.raises(ValueError, match=r"first is 'csc', it takes conv or lista"):
        VGG11(first="csc")
    with pytest.raises(ValueError, match=r"size is 12, it takes at least 16"):
        LeNet5(size=12)
    with pytest.raises(ValueError, match=r"width is 0, it takes at least 1"):
        UNet(width=0)
    with pytest.raises(ValueError, match=r"images has shape \(1, 3, 40, 32\).*multiples of 16"):
        UNet(width=1)(torch.zeros(1, 3, 40, 32))


# ------------------------------------------------------------------------------------------------------------- metrics


def formulas(predicted: np.ndarray, mask: np.ndarray) -> list[float]:
    """PA, mPA, mIoU of one image, written out; 0 / 0 is 1 when the class is neither there nor predicted, else 0."""
    shares, overlaps = [], []
    for value in (True, False):
        both = np.sum((predicted == value) & (mask == value))
        said, either = np.sum(predicted == value), np.sum((predicted == value) | (mask == value))
        shares.append(1.0 if either == 0 else both / said if said else 0.0)
        overlaps.append(1.0 if either == 0 else both / either)
    return [np.mean(predicted == mask), np.mean(shares), np.mean(overlaps)]


def test_scores_of_masks_are_the_formulas_image_by_image():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(12, 1, 8, 9, generator=generator) > torch.linspace(0.1, 0.9, 12).view(-1, 1, 1, 1)
    mask = torch.rand(12, 1, 8, 9, generator=generator) > 0.6
    empty, full = torch.zeros(1, 8, 9, dtype=torch.bool), torch.ones(1, 8, 9, dtype=torch.bool)
    for index, pair in enumerate([(empty, empty), (full, full), (empty, full), (full, empty), (empty, mask[5])]):
        predicted[index], mask[index] = pair
    expected = np.array([formulas(p, m) for p, m in zip(predicted.numpy(), mask.numpy(), strict=True)])
    np.testing.assert_allclose(mask_scores(predicted, mask.float()).numpy(), expected, rtol=1e-12)
    assert expected[0].tolist() == [1, 1, 1] and expected[2].tolist() == [0, 0, 0]
    scores = MaskScores()
    for part in (slice(0, 5), slice(5, 12)):
        scores.update(predicted[part], mask[part].float())
    found = scores.compute()
    for column, name in enumerate(report.SCORES):
        assert float(found[name]) == pytest.approx(expected[:, column].mean())
        assert float(found[f"{name}_std"]) == pytest.approx(expected[:, column].std())


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the other processes below: sums in the same order, to the last bit."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """A root whose file of CIFAR-10 has noise in the pictures that ``limit`` takes; the rest is a hole."""
    root = tmp_path_factory.mktemp("cifar")
    rows = np.lib.format.open_memmap(root / "cifar-10.npy", "w+", np.uint8, (60000, 3073))
    random = np.random.default_rng(0)
    for start in (0, 50000):
        rows[start : start + LIMIT] = random.integers(0, 256, (LIMIT, 3073))
        rows[start : start + LIMIT, 0] %= 10
    rows.flush()
    return root


def arguments(cifar: Path, output: Path, *more: str, row: str = "lenet5-relu-l1") -> list[str]:
    data = {"root": cifar, "limit": LIMIT, "batch_size": BATCH}
    return [
        *(
            "fit",
            "--config",
            str(CONFIGS / f"{row}.yaml"),
            "--output",
            str(output),
            "--trainer.max_epochs",
            str(EPOCHS),
        ),
        *(f"--data.init_args.{name}={value}" for name, value in data.items()),
        "--model.init_args.gamma=0.5",  # so that a lost penalty would be seen
        "--trainer.enable_progress_bar=false",
        *more,
    ]


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = torch.load(output / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in state.items()}


@pytest.fixture(scope="module")
def trained(cifar, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("runs") / "lenet5-relu-l1" / "seed0"
    assert train.main(arguments(cifar, output)) == 0
    return output


def test_a_run_leaves_its_record_and_logs(trained):
    record = json.loads((trained / "run.json").read_text())
    assert record["row"] == "lenet5-relu-l1" and record["finished"] and record["epochs"] == EPOCHS
    assert record["data"] == "CIFAR-10" and record["versions"]["torch"] == torch.__version__ and record["hours"] > 0
    assert list(trained.glob("tensorboard/*/events*"))
    columns = report.history(trained)
    assert {"train_loss", "train_l1", "val_loss", "val_accuracy", "density/block1"} <= columns.keys()
    assert all(len(values) == EPOCHS and None not in values for values in columns.values())


def test_what_is_logged_is_true_of_the_final_network(trained, cifar):
    network = LeNet5()
    network.load_state_dict(weights(trained))
    data = CIFAR10(cifar, BATCH, limit=LIMIT)
    data.setup()
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    features = {}
    for name in LeNet5.FEATURES:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: features.update({name: output})
        )
    with torch.no_grad():
        logits = network(images)
    columns = report.history(trained)
    for name, x in features.items():
        assert columns[f"density/{name}"][-1] == pytest.approx(float((x.abs() > 1e-6).float().mean()), rel=1e-5)
    assert columns["val_accuracy"][-1] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert columns["val_loss"][-1] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_the_learning_rate_falls_as_a_cosine_to_zero_and_the_penalty_has_its_weight(cifar, tmp_path, monkeypatch):
    from examples.tasks import Classification

    rates, losses = [], []

    def on_train_batch_end(task, outputs, batch, index):
        rates.append(task.optimizers().param_groups[0]["lr"])
        losses.append(float(outputs["loss"]))

    monkeypatch.setattr(Classification, "on_train_batch_end", on_train_batch_end, raising=False)
    output = tmp_path / "run"
    train.main(arguments(cifar, output))
    steps = EPOCHS * STEPS
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * k / steps)) for k in range(1, steps + 1)], abs=1e-9)
    columns = report.history(output)
    sums = np.add(columns["train_loss"], 0.5 * np.array(columns["train_l1"]))
    assert np.reshape(losses, (EPOCHS, STEPS)).mean(1) == pytest.approx(sums, rel=1e-5)


# A run that is killed in the middle of its second epoch.
KILLED = """
import os, signal, sys
from examples import train, training

take_step = training.Learner.training_step

def training_step(learner, batch, index):
    if learner.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(learner, batch, index)

training.Learner.training_step = training_step
train.main(sys.argv[1:])
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, timeout=300, **out)


def test_a_killed_run_goes_on_and_ends_the_same(trained, cifar, tmp_path, capsys):
    output = tmp_path / "run"
    killed = run("-c", KILLED, *arguments(cifar, output))
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert not json.loads((output / "run.json").read_text())["finished"]
    train.main(arguments(cifar, output))
    assert f"going on from the checkpoint of step {STEPS}" in capsys.readouterr().out
    one, other = weights(output), weights(trained)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert report.history(output) == report.history(trained)
    assert json.loads((output / "run.json").read_text())["finished"]


def test_a_folder_of_another_run_is_refused(trained, cifar):
    with pytest.raises(SystemExit, match="holds a run with other settings.*choose another --output"):
        train.main(arguments(cifar, trained, "--seed_everything=1"))


def test_two_processes_train_as_one(trained, cifar, tmp_path):
    output = tmp_path / "run"
    more = ("--trainer.devices=2", "--trainer.strategy=ddp")
    done = run("-m", "examples.train", *arguments(cifar, output, *more))
    assert done.returncode == 0, done.stdout
    one, two = report.history(trained), report.history(output)
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    shared, alone = weights(output), weights(trained)
    assert all(torch.allclose(shared[name], alone[name], atol=1e-5) for name in alone)


def test_mixed_precision_with_the_progress_bar(cifar, tmp_path, capsys):
    more = ("--trainer.precision=bf16-mixed", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=true")
    train.main(arguments(cifar, tmp_path / "run", *more))
    printed = "".join(capsys.readouterr())
    assert "lenet5-relu-l1, epoch 1/1: 100%" in printed and "loss=" in printed and "val_accuracy=" in printed
    columns = report.history(tmp_path / "run")
    assert all(np.isfinite(values).all() for values in columns.values())
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


@pytest.fixture(scope="module")
def segmented(tmp_path_factory) -> Path:
    """The folder of a tiny run of the Unet on bright squares, with two test sets."""
    root = tmp_path_factory.mktemp("duts")
    random = np.random.default_rng(0)
    for name, total in (("DUTS-TR", 8), ("DUTS-TE", 5), ("DUTS-TE-2", 3)):
        layout = name[:7]
        folder = root / ("more" if name.endswith("2") else ".") / layout
        for part in ("Image", "Mask"):
            (folder / f"{layout}-{part}").mkdir(parents=True)
        for index in range(total):
            mask = np.zeros((20, 20), np.uint8)
            top, left = random.integers(0, 10, 2)
            mask[top : top + 8, left : left + 8] = 255
            image = (random.random((20, 20, 3)) * 80 + mask[..., None] * 0.6).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{layout}-Image" / f"{index}.jpg")
            Image.fromarray(mask).save(folder / f"{layout}-Mask" / f"{index}.png")
    output = tmp_path_factory.mktemp("runs") / "unet-l1" / "seed0"
    tests = json.dumps([str(root / "DUTS-TE"), str(root / "more" / "DUTS-TE")])
    data = {"root": root, "train": root / "DUTS-TR", "test": tests, "size": 16}
    train.main(
        [
            *("fit", "--config", str(CONFIGS / "unet-l1.yaml"), f"--output={output}", "--trainer.max_epochs=1"),
            *(f"--data.init_args.{name}={value}" for name, value in data.items()),
            *("--model.init_args.network.init_args.width=2", "--trainer.enable_progress_bar=false"),
        ]
    )
    return output


def test_each_test_set_of_masks_has_its_scores(segmented):
    columns = report.history(segmented)
    for index in range(2):
        for name in ("PA", "mPA", "mIoU"):
            assert 0 <= columns[f"val_{name}/dataloader_idx_{index}"][0] <= 1
    assert sum(name.startswith("density/encoder") for name in columns) == 2 * len(UNet.FEATURES)
    saved = torch.load(segmented / "masks.pt", weights_only=True)
    assert saved["probabilities"].shape == saved["masks"].shape == (4, 1, 16, 16)
    # The second set has three pictures, the first five: the first four, then one.
    facts = json.loads((segmented / "run.json").read_text())
    assert facts["tests"] == ["DUTS-TE", "DUTS-TE"] and len(facts["prior"]) == 2


ALL_ROWS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")


def test_every_row_of_the_paper_has_a_config():
    assert set(ALL_ROWS) == set(report.ROWS)
    assert {row for group in experiments.GROUPS.values() for row in group.rows} <= set(ALL_ROWS)


@pytest.mark.parametrize("row", sorted(report.DEEP_ROWS))
def test_each_config_makes_what_its_name_says(row, segmented, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    pictures = json.loads((segmented / "run.json").read_text())["settings"]["data"]["init_args"]["train"]
    small = {"vgg11": ["--model.init_args.network.init_args.width=0.1"]}
    small["unet"] = ["--model.init_args.network.init_args.width=2"]
    small["unet"] += [f"--data.init_args.train={pictures}", f"--data.init_args.test=[{pictures}]"]
    name, _, kind = row.removesuffix("-l1").partition("-")
    cli = CLI(["--config", str(CONFIGS / f"{row}.yaml"), *small.get(name, [])], run=False)
    task, network = cli.model, cli.model.network
    assert type(network) is {"lenet5": LeNet5, "vgg11": VGG11, "unet": UNet}[name]
    paper = report.PAPER_GAMMA.get(row.removesuffix("-l1"), report.PAPER_GAMMA.get(f"{name}-relu", 1e-3))
    assert task.gamma == (paper if row.endswith("-l1") else 0)
    assert task.penalty.names == list(network.BLOCKS)
    assert isinstance(network.get_submodule(network.BLOCKS[0]), dsc_ops.LISTAConv) == (kind == "lista")
    activation = {"elu": nn.ELU, "mish": nn.Mish}.get(kind, nn.ReLU)
    assert any(isinstance(module, activation) for module in network.modules())
    optimizer = task.optimizer(network.parameters())
    rate = 0.005 if name == "unet" else 0.1
    assert optimizer.defaults["weight_decay"] == (0 if name == "unet" else 5e-4)
    assert isinstance(optimizer, torch.optim.Adam if name == "unet" else torch.optim.SGD)
    assert optimizer.defaults.get("momentum", 0) == {"lenet5": 0.9, "vgg11": 0, "unet": 0}[name]
    assert optimizer.defaults["lr"] == rate and cli.trainer.max_epochs == 200
    assert cli.datamodule.batch_size == (4 if name == "unet" else 128)


# ------------------------------------------------------------------------------------------------- experiments, report


class FakeRuns(experiments.Runs):
    """Runs that take no time and say that an epoch takes 36 s."""

    made: list[tuple] = []

    def train(self, row, seed, epochs, output):
        self.made.append((row, seed, epochs))
        output.mkdir(parents=True, exist_ok=True)
        found = {"finished": True, "epochs": epochs, "hours": 0.01 * epochs}
        (output / "run.json").write_text(json.dumps(found))
        return found


def test_the_epochs_of_all_runs_fit_the_budget():
    # Three seeds of rows that take 40 s an epoch together and 20 s to start: 16 epochs are 3 * (20 + 16 * 40) = 1980 s.
    assert experiments.epochs_that_fit(1979, 40, 20, seeds=3, jobs=1) == 15
    assert experiments.epochs_that_fit(1980, 40, 20, seeds=3, jobs=1) == 16
    assert experiments.epochs_that_fit(990, 40, 20, seeds=3, jobs=2) == 16
    assert experiments.epochs_that_fit(-5, 40, 20, seeds=3, jobs=2) < 1


def test_the_runner_plans_once_and_goes_on_as_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "Runs", FakeRuns)
    monkeypatch.setattr(FakeRuns, "made", [])
    budget = ["vgg11", "--output", str(tmp_path), "--seeds", "2", "--hours"]
    with pytest.raises(SystemExit, match=r"--hours is 0\.01; one epoch of each run already takes 0\.04"):
        experiments.main([*budget, "0.01"])
    assert not (tmp_path / "vgg11.json").exists()
    experiments.main([*budget, "1"])
    epochs = json.loads((tmp_path / "vgg11.json").read_text())["epochs"]
    assert epochs in (24, 25)  # 2 rows, 2 seeds, 36 s an epoch: 3600 / 144
    rows = experiments.GROUPS["vgg11"].rows
    assert FakeRuns.made[-4:] == [(row, seed, epochs) for seed in range(2) for row in rows]
    FakeRuns.made.clear()
    experiments.main([*budget, "50"])
    assert len(FakeRuns.made) == 4 and all(made[2] == epochs for made in FakeRuns.made)
    assert f"{epochs} epochs, 2 seeds" in capsys.readouterr().out


def test_a_run_that_fails_is_named_with_its_console(tmp_path, monkeypatch):
    commands = []

    def fail(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(experiments.subprocess, "run", fail)
    runs = experiments.Runs(2, ["--trainer.precision=bf16-mixed"])
    with pytest.raises(RuntimeError, match=r"lenet5-relu, seed 3, ended with status 2: see .*console\.txt"):
        runs.train("lenet5-relu", 3, 7, tmp_path / "run")
    assert commands[0][1:4] == ["-m", "examples.train", "fit"] and commands[0][-1] == "--trainer.precision=bf16-mixed"
    assert {"--seed_everything=3", "--trainer.max_epochs=7", f"--output={tmp_path / 'run'}"} <= set(commands[0])


def test_a_run_is_not_made_twice_at_the_same_time(tmp_path):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
    holder += "input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "console.txt")], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="is in use by a run that has not ended"):
            experiments.Runs(1, ["--no.such.option=1"]).train("lenet5-relu", 0, 1, tmp_path)
        other.communicate("\n")


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"finished": true, "epochs": 1}')
    runs = experiments.Runs(1, ["--no.such.option=1"])
    assert runs.train("lenet5-relu", 0, 1, tmp_path)["epochs"] == 1

    def fail(*command, **options):
        raise KeyError("run")

    monkeypatch.setattr(experiments.subprocess, "run", fail)
    with pytest.raises(KeyError):  # a plan of more epochs is not fulfilled by that
        runs.train("lenet5-relu", 0, 2, tmp_path)


def test_later_logs_replace_the_epochs_that_they_repeat(tmp_path):
    for number, lines in ((0, "0,1,0.5\n1,3,0.4\n2,5,\n"), (10, "2,5,0.1\n3,7,0.05\n"), (2, "1,3,0.3\n2,5,0.2\n")):
        folder = tmp_path / "csv" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("epoch,step,train_loss\n" + lines)
    assert report.history(tmp_path) == {"train_loss": [0.5, 0.3, 0.1, 0.05]}


def test_the_report_shows_what_was_run_and_says_what_was_not(trained, segmented, tmp_path, capsys):
    runs, output = tmp_path / "runs", tmp_path / "results"
    for folder in (trained, segmented):
        (runs / folder.parent.name).mkdir(parents=True)
        (runs / folder.parent.name / "seed0").symlink_to(folder)
    assert report.main(["--runs", str(runs), "--output", str(output)]) == 0
    page = (output / "README.md").read_text()
    accuracy = 100 * report.history(trained)["val_accuracy"][-1]
    assert f"| LeNet-5 relu | 0.001 | not run | {accuracy:.2f} | not run |" in page
    assert "| LeNet-5 elu | 0.01 | not run | not run | not run | not run |  |" in page
    assert "| Unet | paper | DUTS-TE | 0.9203 ± 0.1004 |" in page and "| Unet | ours | not run |" in page
    assert page.count("| Unet + l1, width 2 | ours, seed 0 | DUTS-TE |") == 2
    assert "| mean of the training masks, cut at 1/2 | ours | DUTS-TE | 0." in page
    assert "| lenet5-relu-l1 | 0 | 3 |" in page and "| vgg11-relu | not run |" in page
    for name in ("accuracy", "loss-lenet5", "bce-penalty", "density", "masks"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"]({name}.png)" in page
    assert not (output / "loss-vgg11.png").exists() and "loss-vgg11" not in page
    # Without the logs, from the JSON alone: the same page.
    assert report.main(["--runs", str(tmp_path / "none"), "--output", str(output)]) == 0
    assert (output / "README.md").read_text() == page


def test_the_committed_page_is_the_report_of_the_committed_json(tmp_path, monkeypatch):
    """And the rows that the README of the examples shows are those of the page."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *arguments, **options: None)
    results = shutil.copytree(ROOT / "examples" / "results", tmp_path / "results")
    committed = (results / "README.md").read_text()
    report.main(["--runs", str(tmp_path / "none"), "--output", str(results)])
    assert (results / "README.md").read_text() == committed
    readme = (ROOT / "examples" / "README.md").read_text()
    shown = [line for part in readme.split("what was run here\n")[1:] for line in part.split("\n## ")[0].splitlines()]
    rows = [line for line in shown if line.startswith("|")]
    assert len(rows) > 20 and set(rows) <= set(committed.splitlines())


def test_every_result_on_composites_is_labelled_so(segmented, tmp_path):
    run, output = tmp_path / "runs" / "unet-l1" / "seed0", tmp_path / "results"
    shutil.copytree(segmented, run)
    facts = json.loads((run / "run.json").read_text())
    facts |= {"data": "composites, not DUTS-TR", "tests": ["composites, not DUTS-TE", "composites, not DUT-OMRON"]}
    (run / "run.json").write_text(json.dumps(facts))
    report.main(["--runs", str(run.parents[1]), "--output", str(output)])
    page = (output / "README.md").read_text()
    for line in page.splitlines():
        if "| ours, seed" in line or "cut at 1/2" in line or line.startswith("| unet-l1 | 0 |"):
            assert "| composites, not DUT" in line
    assert page.count("| ours, seed 0 | composites, not") == page.count("cut at 1/2 | ours | composites, not") == 2
    assert "of the Unet in training (composites, not DUTS-TR)." in page
    assert "first test pictures (composites, not DUTS-TE; composites, not DUT-OMRON), their masks" in page
    results = json.loads((output / "unet-l1.json").read_text())
    for draw in (paper_figures.bce_and_penalty, paper_figures.density):
        assert "composites, not DUT" in draw({"unet-l1": results}).axes[0].get_title()


def test_seeds_are_averaged_and_unfinished_runs_are_named():
    values = (0.5, 0.7)
    made = [{"finished": True, "epochs": 4 - k, "history": {"val_accuracy": [0.1, v]}} for k, v in enumerate(values)]
    assert report.over_seeds(made, "val_accuracy", 100) == "60.00 ± 14.14"
    assert report.over_seeds(made[:1], "val_accuracy", 100) == "50.00"
    assert report.over_seeds(made, "val_mIoU") == report.over_seeds([], "val_mIoU") == "not run"
    assert report.epochs(made) == "3-4 epochs, 2 seeds"
    made[1]["finished"] = False
    assert report.epochs(made) == "3-4 epochs, 2 seeds, unfinished"


def test_a_run_without_a_whole_epoch_has_no_scores_to_show(tmp_path):
    young = {"tests": ["DUTS-TE"], "history": {"train_loss": [0.5], "val_mIoU": [None]}, "seed": 0, "epochs": 0}
    table = report.segmentation_table({"unet": [young]})
    assert "seed 0" not in table and "| Unet + l1 | ours | not run |" in table
    run = tmp_path / "unet" / "seed0" / "run.json"
    run.parent.mkdir(parents=True)
    run.write_text(json.dumps({"epochs": 0}))
    assert report.collect(tmp_path) == {}


def test_the_report_of_nothing_says_so(tmp_path):
    report.main(["--runs", str(tmp_path / "none"), "--output", str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    assert page.count("not run") > len(report.ROWS) and "png" not in page


@pytest.mark.parametrize("name", throughput.CASES)
def test_a_listaconv_in_place_of_the_first_block_starts_sparse_and_alive(name):
    network = throughput.make_network(name, "fused")
    codes = network.get_submodule(network.BLOCKS[0])(throughput.crops(8, throughput.CASES[name][1]))
    assert 0.03 < dsc_ops.functional.density(codes) < 0.25


def test_the_eager_contender_computes_the_same_step():
    images = throughput.crops(2, 32)
    fused, eager = (throughput.make_network("lenet5", name) for name in ("fused", "eager"))
    assert not any(isinstance(module, dsc_ops.LISTAConv) for module in (eager.block1,))
    for network in (fused, eager):
        network(images).square().sum().backward()
    assert fused(images).allclose(eager(images), atol=1e-5)
    gradients = (network.fc1[0].weight.grad for network in (fused, eager))
    assert torch.allclose(*gradients, atol=1e-5, rtol=1e-4)
    assert eager.block1.layer.dictionary.grad.allclose(fused.block1.dictionary.grad, atol=1e-4, rtol=1e-3)


def test_throughput_writes_what_the_report_shows(tmp_path, monkeypatch):
    monkeypatch.setitem(throughput.CASES, "lenet5", (2, 32))
    threads = torch.get_num_threads()
    assert throughput.main(["lenet5", "--repeats", "1", "--output", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    table = report.throughput_table(tmp_path)
    assert "| LeNet-5, batch 2, 32 x 32 |" in table and f"torch {torch.__version__}, " in table
    command = f"python -m examples.throughput lenet5 --repeats 1 --output {tmp_path}"
    assert f"By `{command}`, commit {commit()}, dsc_ops {dsc_ops.__version__}, " in table
    assert json.loads((tmp_path / "throughput.json").read_text())["hours"] > 0
    with pytest.raises(SystemExit, match="NETWORK is alexnet; it takes some of lenet5"):
        throughput.main(["alexnet"])


@pytest.mark.parametrize("program", [experiments, report, throughput])
def test_help_explains_the_programs(program, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0 and "--output" in capsys.readouterr().out
