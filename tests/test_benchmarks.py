"""benchmarks/: the shapes are the agreed ones, problems reach the density asked for, a run writes what it measured."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("skimage", reason="the benchmarks need pip install dsc_ops[examples]")
pytest.importorskip("mlxtend", reason="the benchmarks need pip install dsc_ops[examples]")

from benchmarks import cases, run
from dsc_ops import reference

# name: shapes of signal, dictionary and code, as in the table of cases that performance claims refer to.
SHAPES = {
    "denoise-gray": ((8, 1, 128, 128), (64, 1, 7, 7), (8, 64, 128, 128)),
    "denoise-rgb": ((8, 3, 96, 96), (64, 3, 7, 7), (8, 64, 96, 96)),
    "stem-cifar": ((32, 3, 32, 32), (64, 3, 3, 3), (32, 64, 32, 32)),
    "stem-imagenet": ((4, 3, 224, 224), (64, 3, 7, 7), (4, 64, 112, 112)),
    "deep": ((16, 64, 32, 32), (128, 64, 3, 3), (16, 128, 32, 32)),
    "signal": ((32, 1, 4096), (64, 1, 65), (32, 64, 4096)),
    "dense": ((1, 250, 4096), (500, 250, 1), (1, 500, 4096)),
}


def test_the_cases_are_the_agreed_ones():
    assert list(cases.CASES) == list(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_a_case(name):
    case = cases.CASES[name]
    signal = torch.empty(case.signal_shape, device="meta")
    dictionary = torch.empty(case.dictionary_shape, device="meta")
    code = reference.analysis(signal, dictionary, **case.geometry)
    assert (case.signal_shape, case.dictionary_shape, tuple(code.shape)) == SHAPES[name]


@pytest.mark.parametrize("name", SHAPES)
def test_a_problem_is_one_of_real_signals_at_the_density_asked_for(name):
    case = cases.CASES[name].scaled(1 if name != "dense" else 16)
    task = cases.problem(case, density=0.1, iterations=2)
    assert task.signal.shape == case.signal_shape
    assert task.signal.isfinite().all() and task.signal.std() > 0
    assert task.dictionary.flatten(1).norm(dim=1).allclose(torch.ones(case.atoms))
    assert task.analysis.shape == (2, *case.dictionary_shape) and task.theta.shape == (2, 1)
    code = reference.lista(task.signal, task.dictionary, task.analysis, task.theta, **case.geometry)
    assert float(reference.density(code)) == pytest.approx(task.density, abs=1e-3)
    assert task.density == pytest.approx(0.1, rel=0.1)


def test_the_same_seed_gives_the_same_problem():
    case = cases.CASES["stem-cifar"].scaled(1)
    one, same, other = (cases.problem(case, 0.1, 1, seed=seed).dictionary for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_run_writes_medians_spread_and_ratio(tmp_path, capsys):
    output = tmp_path / "new" / "result.json"
    threads = torch.get_num_threads()
    arguments = ["--cases", "stem-cifar", "signal", "--batch", "1", "--iterations", "2", "--repeats", "3"]
    arguments += ["--modes", "forward", "training", "--threads", "1", "--output", str(output)]
    run.main(arguments)
    assert torch.get_num_threads() == threads

    written = json.loads(output.read_text())
    assert written["machine"]["dsc_ops"]["torch"] == torch.__version__
    found = [(result["case"], result["mode"]) for result in written["results"]]
    assert found == [(case, mode) for case in ("stem-cifar", "signal") for mode in ("forward", "training")]
    for result in written["results"]:
        fused, eager = (result["contenders"][name] for name in ("fused", "eager"))
        for contender in (fused, eager):
            assert len(contender["times"]) == 3 and contender["iqr"] >= 0
            assert min(contender["times"]) <= contender["median"] <= max(contender["times"])
        assert result["ratio"] == pytest.approx(eager["median"] / fused["median"])
        assert result["threads"] == 1 and result["iterations"] == 2
    assert [path.name for path in output.parent.iterdir()] == ["result.json"]
    printed = capsys.readouterr().out
    assert printed.count("stem-cifar") == 2 and str(output) in printed


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--cases", "nothing"], "--cases"),
        (["--repeats", "0"], "--repeats"),
        (["--densities", "1.5"], "--densities"),
    ],
)
def test_wrong_options_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2 and named in capsys.readouterr().err
