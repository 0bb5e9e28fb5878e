"""python -m examples.theory: it draws every figure, says which promises hold, and an interrupted run loses nothing."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("matplotlib", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("mlxtend", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("scipy", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("skimage", reason="the examples need pip install dsc_ops[examples]")

from test_examples import ROOT, run

from dsc_ops import theory
from examples import deep, recovery
from examples import theory as program


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory) -> tuple[Path, str]:
    """Folder and console of one whole fast run."""
    folder = tmp_path_factory.mktemp("theory") / "runs"
    status, console = run("-m", "examples.theory", "--fast", "--output", str(folder))
    assert status == 0, console
    return folder, console


def test_every_step_has_results_and_a_figure(fast_run):
    folder, console = fast_run
    for step in program.STEPS:
        assert (folder / f"theory-{step}.png").read_bytes().startswith(b"\x89PNG")
        results = json.loads((folder / step / "results.json").read_text())
        assert results["machine"]["dsc_ops"]["torch"] == torch.__version__ and results["seconds"] > 0
        assert f"theory-{step}.png" in console
    assert not list(folder.rglob("*.unfinished"))
    assert "BROKEN" not in console and len(re.findall("^holds", console, re.MULTILINE)) == 5
    assert "arning" not in console and "Traceback" not in console
    assert "its numbers mean nothing" in console


# The program, killed in the middle of the fifth of seven stages of the second network.
KILLED = """
import signal, sys
from examples import recovery, theory

take_step = recovery.LayerwiseLearner.training_step

def training_step(learner, batch, index):
    if learner.network.kind == "LISTA-CP" and learner.global_step == 18:
        signal.raise_signal(signal.SIGKILL)
    return take_step(learner, batch, index)

recovery.LayerwiseLearner.training_step = training_step
sys.exit(theory.main(sys.argv[1:]))
"""


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the program ignores it too, outside of pytest
def test_a_killed_benchmark_goes_on_from_its_stage_and_ends_the_same(fast_run, tmp_path, capsys):
    arguments = ("--fast", "--steps", "benchmark", "--output", str(tmp_path / "runs"))
    status, console = run("-c", KILLED, *arguments)
    folder = tmp_path / "runs" / "benchmark"
    assert status == -signal.SIGKILL, console
    assert (folder / "LISTA-20-dB" / "result.json").exists() and not (folder / "results.json").exists()
    assert torch.load(folder / "LISTA-CP-20-dB" / "last.ckpt", weights_only=True)["global_step"] == 16
    assert program.main(list(arguments)) == 0
    console = "".join(capsys.readouterr())
    assert "LISTA-CP, 20 dB: going on from the checkpoint of step 16" in console
    assert not re.search("^LISTA, 20 dB, epoch", console.replace("\r", "\n"), re.MULTILINE)
    one, other = (json.loads((f / "results.json").read_text()) for f in (folder, fast_run[0] / "benchmark"))
    assert [row["nmse"] for row in one["networks"]] == [row["nmse"] for row in other["networks"]]


def test_finished_steps_are_not_run_again(fast_run, monkeypatch, capsys):
    monkeypatch.setattr(program, "cnn", lambda *arguments: pytest.fail("it ran again"))
    assert program.main(["--fast", "--output", str(fast_run[0]), "--steps", "cnn"]) == 0
    assert "cnn: finished before" in capsys.readouterr().out


def test_a_broken_promise_is_told_and_is_the_exit_status(tmp_path, monkeypatch, capsys):
    broken = {"measured": [1.0], "bound": [0.5], "earlier": {"layered": [2.0], "projected": [math.inf]}}
    broken |= {"lambdas": [1], "mu": [0.5]}
    monkeypatch.setattr(program, "stability", lambda *arguments: broken)
    assert program.main(["--steps", "stability", "--output", str(tmp_path)]) == 1
    assert "BROKEN  The error found is under the bound" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    precious = tmp_path / "cnn" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("...")
    with pytest.raises(SystemExit, match="choose another --output"):
        program.main(["--fast", "--restart", "--steps", "cnn", "--output", str(tmp_path)])
    assert precious.exists()


def test_help_explains_every_step(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    printed = "".join(capsys.readouterr().out.split())  # lines may end at a hyphen
    assert end.value.code == 0
    assert all("".join(text.split()) in printed for text in program.STEPS.values())


def test_the_page_names_every_function_and_shows_every_figure():
    page = (ROOT / "docs" / "theory.md").read_text()
    assert all(f"`{name}" in page for name in theory.__all__ if name[0].islower())
    for step in program.STEPS:
        assert f"](theory-{step}.png)" in page and (ROOT / "docs" / f"theory-{step}.png").exists()


# --- the experiments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("girth", [3, 4, 5, 6])
def test_the_coherence_of_a_graph_is_told_by_its_shortest_cycle(girth):
    D = deep.graph_dictionary(24, 28, girth, seed=0)
    assert (D != 0).sum(dim=0).eq(2).all() and D.norm(dim=0).allclose(torch.ones(28).double())
    # The shortest cycle may be longer than was asked for; with all its signs agreeing it gives 1 / (g - 1).
    mu = theory.generalized_coherence(D)[0]
    assert mu <= 1 / (girth - 1) + 1e-8
    assert any(mu == pytest.approx(1 / (g - 1), abs=1e-8) for g in range(girth, 28))


def test_rulers_share_one_mark_at_most():
    assert theory.mutual_coherence(deep.rulers(64, 100)) == 0.25


def test_activations_are_as_near_to_relu_as_they_should_be():
    v = torch.linspace(-50, 50, 100_001, dtype=torch.float64)
    for shape in deep.SHAPES.values():
        assert 0.99e-2 <= (deep.scaled(shape, 1e-2)(v) - v.relu()).abs().max() <= 1e-2
    rho = deep.leaky(0.5, 0.1)
    assert rho(torch.tensor([-9.0, -1.0, 2.0])).tolist() == pytest.approx([-0.5, -0.1, 2.0])


# --- the benchmark ----------------------------------------------------------------------------------------------------

SETTINGS = recovery.Settings(m=12, d=20, layers=4)


def test_problems_are_those_of_the_literature():
    settings = recovery.Settings()
    D = recovery.dictionary(settings, 0)
    assert D.shape == (250, 500) and D.norm(dim=0).allclose(torch.ones(500))
    y, codes = recovery.problems(D, 400, settings, recovery.NOISELESS, 1)
    assert float((codes != 0).float().mean()) == pytest.approx(0.1, abs=0.002)
    assert float(codes[codes != 0].std()) == pytest.approx(1, abs=0.02)
    assert y.allclose(codes @ D.T)
    noisy, same = recovery.problems(D, 400, settings, 30.0, 1)
    assert torch.equal(same, codes)
    assert float(20 * torch.log10(y.std() / (noisy - y).std())) == pytest.approx(30, abs=0.1)


def kinds(layers: int = 4) -> list[recovery.Network]:
    D = recovery.dictionary(SETTINGS, 0)
    networks = [recovery.Network(kind, D, layers, 0.4) for kind in recovery.TRAINED]
    for network in networks:
        for parameter in network.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return networks


@pytest.mark.parametrize("network", kinds(), ids=lambda network: network.kind)
def test_networks_are_their_formulas(network):
    D = recovery.dictionary(SETTINGS, 0)
    y, _ = recovery.problems(D, 9, SETTINGS, 20.0, 3)
    x = torch.zeros(9, 20)
    for k in range(4):
        theta = network.log_theta[k].exp()
        if network.kind == "LISTA":
            u = torch.cat([y, x], dim=1) @ network.weights[k].T
        elif network.kind == "ALISTA":
            u = x + network.log_step[k].exp() * (y - x @ D.T) @ theory.analytic_coherence(D)[1]
        else:
            u = x + (y - x @ D.T) @ network.weights[k].T
        x = u.sign() * (u.abs() - theta).relu()
        if network.kind in ("LISTA-CP-SS", "ALISTA"):
            count = round(20 * min(1.2 * (k + 1), 13) / 100)  # percent
            order = u.abs().argsort(dim=1, descending=True).argsort(dim=1)
            x = torch.where((order < count) & (u.abs() > theta), u, x)
        assert network(y, k + 1).allclose(x, atol=1e-5)
        before = network(y, k) if k else None
        assert network(y, k + 1, before, k).allclose(x, atol=1e-5)  # one layer alone, as in training


def test_untrained_lista_cp_and_lista_are_ista():
    D = recovery.dictionary(SETTINGS, 0)
    y, _ = recovery.problems(D, 9, SETTINGS, 20.0, 3)
    step = 1 / (1.001 * float(torch.linalg.matrix_norm(D, 2)) ** 2)
    x = torch.zeros(9, 20)
    for _ in range(4):
        u = x + step * (y - x @ D.T) @ D
        x = u.sign() * (u.abs() - 0.4 * step).relu()
    for kind in ("LISTA", "LISTA-CP"):
        assert recovery.Network(kind, D, 4, 0.4)(y, 4).allclose(x, atol=1e-5)


def test_stages_train_each_layer_alone_and_then_all():
    settings = recovery.Settings(layers=3, final_stages=2)
    plan = [(stage.depth, stage.first, stage.share) for stage in recovery.stages(settings)]
    layers = [(1, 0, 1.0), (2, 1, 1.0), (2, 0, 0.2), (3, 2, 1.0), (3, 0, 0.2)]
    final = [(3, 0, 0.2), (3, 0, 0.2), (3, 0, 0.02), (3, 0, 0.02)]
    assert plan == layers + final
