"""benchmarks/: the shapes are the agreed ones, problems reach the density asked for, contenders compute the same, and
ratios, limits, memory, the regression guard and the files are what they are said to be."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("skimage", reason="the benchmarks need pip install dsc_ops[examples]")
pytest.importorskip("mlxtend", reason="the benchmarks need pip install dsc_ops[examples]")

from benchmarks import (
    cases,
    contenders,
    csc,
    memory,
    operators,
    peers,
    program,
    roofline,
    run,
    timing,
    unrolled,
)
from benchmarks.cases import Case
from benchmarks.check import check
from benchmarks.machine import machine, machine_name, write_whole
from dsc_ops import functional, reference

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

SMALL = {
    "picture": Case("picture", 2, 1, (24, 24), 8, 5, 1, "two axes"),
    "stride": Case("stride", 1, 3, (17, 24), 8, 5, 2, "a stride"),
    "line": Case("line", 2, 1, (64,), 8, 9, 1, "one axis"),
    "matrix": Case("matrix", 16, 20, (), 40, 1, 1, "no axis"),
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


@pytest.mark.parametrize("setting", cases.SETTINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_problem_is_one_at_the_density_asked_for(name, setting):
    case = cases.CASES[name].scaled(1 if name != "dense" else 16)
    task = cases.problem(case, 0.1, 2, setting)
    assert task.signal.shape == case.signal_shape
    assert task.signal.isfinite().all() and task.signal.std() > 0
    assert task.dictionary.flatten(1).norm(dim=1).allclose(torch.ones(case.atoms))
    assert task.analysis.shape == (2, *case.dictionary_shape) and task.theta.shape == (2, 1)
    code = reference.lista(task.signal, task.dictionary, task.analysis, task.theta, **case.geometry)
    assert float(reference.density(code, 0)) == pytest.approx(task.density, abs=1e-3)
    assert torch.allclose(task.code, code, atol=1e-5)
    assert task.density == pytest.approx(0.1, rel=0.1)


def test_the_same_seed_gives_the_same_problem():
    case = cases.CASES["stem-cifar"].scaled(1)
    one, same, other = (cases.problem(case, 0.1, 1, seed=seed).dictionary for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("density", cases.DENSITIES)
def test_non_zeros_cluster_on_photographs_and_not_on_noise(density):
    """Non-zeros a pixel: where they lie at random, the variance is about the mean, on photographs larger."""
    case = cases.CASES["denoise-gray"].scaled(1)
    spread = {}
    for setting in cases.SETTINGS:
        counts = cases.problem(case, density, 2, setting).code.count_nonzero(dim=1).double()
        spread[setting] = float(counts.var() / counts.mean())
    assert spread["random"] < 2 < spread["photographs"] / 2


def test_density_one_is_every_entry_and_no_threshold_is_zero():
    task = cases.problem(SMALL["picture"], 1.0, 3)
    assert task.density > 0.98 and (task.theta > 0).all()


@pytest.mark.parametrize("mode", contenders.MODES)
def test_operations_are_dense_ones_at_density_one_and_the_analysis_alone_at_zero(mode):
    task = cases.problem(SMALL["picture"], 0.1, 3)
    size, products = task.code.numel(), 2 * 5 * 5
    for whole, factor in (
        (replace(task, counts=(0, *[size] * 3)), 5),
        (replace(task.one_step(), counts=(size,) * 2), 2),
    ):
        dense, true = whole.operations(mode)
        assert true == dense == products * size * factor * (3 if mode == "training" else 1)
    assert replace(task, counts=(0,) * 4).operations(mode)[1] == 3 * products * size


def test_counts_are_the_non_zeros_of_each_iteration():
    task = cases.problem(SMALL["line"], 0.1, 3)
    code, expected = None, [0]
    for weight, theta in zip(task.analysis, task.theta, strict=True):
        code = reference.lista(
            task.signal, task.dictionary, weight, theta[0], iterations=1, x0=code, **task.case.geometry
        )
        expected.append(int(code.count_nonzero()))
    assert list(task.counts) == pytest.approx(expected, abs=2)
    assert task.mean_density == pytest.approx(sum(expected[1:]) / 3 / code.numel(), abs=1e-2)
    step = task.one_step()
    assert step.start is task.code and step.counts[0] == task.counts[-1] and len(step.counts) == 2


@pytest.mark.parametrize("mode", contenders.MODES)
@pytest.mark.parametrize("single", [True, False], ids=["one step", "unrolled"])
@pytest.mark.parametrize("name", SMALL)
def test_all_contenders_compute_the_same(name, single, mode, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    contenders.compiled.cache_clear()
    case = SMALL[name]
    task = cases.problem(case, 0.1, 3)
    task = (task.one_step() if single else task).to(torch.float64)
    entries = {name: contenders.contender(name, case) for name in ("fused", *contenders.BASELINES)}
    assert [name for name, entry in entries.items() if entry is None] == (
        [] if len(case.spatial) == 2 else ["channels_last"]
    )
    calls = {name: contenders.call(entry, task, mode) for name, entry in entries.items() if entry}
    assert contenders.warm_up(calls, 1e-10) == {}
    assert set(calls) == {name for name, entry in entries.items() if entry}
    contenders.compiled.cache_clear()


def test_a_contender_in_its_memory_format_gets_it():
    task = cases.problem(SMALL["picture"], 0.1, 3)
    seen = []

    def look(y, dictionary, analysis, theta, *, x0, **geometry):
        seen.extend([y, dictionary, *analysis])
        return task.code

    contenders.call(contenders.Contender(look, torch.channels_last), task, "forward")()
    assert len(seen) == 5 and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)
    for tensor, original in zip(seen, (task.signal, task.dictionary, *task.analysis), strict=True):
        assert torch.equal(tensor, original)


def test_contenders_that_differ_are_not_timed():
    calls = {"fused": lambda: (torch.ones(3),), "eager": lambda: (torch.ones(3) * 1.1,)}
    with pytest.raises(RuntimeError, match="eager and fused differ by 9.1e-02"):
        contenders.warm_up(calls)


def test_without_a_compiler_its_contender_is_left_out(monkeypatch):
    def refuse(*given, **options):
        raise RuntimeError("no compiler was found\nand more")

    monkeypatch.setattr(contenders, "compiled", lambda case: refuse)
    row = unrolled.measure(SMALL["line"], iterations=2, repeats=1, baselines=("eager", "compile"))
    assert row["left_out"] == {"compile": "no compiler was found"}
    assert set(row["contenders"]) == {"fused", "eager"} and row["fastest"] == "eager"


class Clock:
    """A clock that only the contenders move on."""

    def __init__(self, monkeypatch):
        self.now, self.ran = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def contender(self, name: str, seconds: float):
        def call():
            self.ran.append(name)
            self.now += seconds

        return call


def test_contenders_take_turns_and_hopeless_baselines_run_once(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {name: clock.contender(name, s) for name, s in (("fused", 3.0), ("eager", 1.0), ("slow", 1.75))}
    times = timing.take_turns(calls, 3)
    assert clock.ran == ["fused", "eager", "slow", "eager", "fused", "fused", "eager"]
    assert times == {"fused": [3.0] * 3, "eager": [1.0] * 3, "slow": [1.75]}


def test_no_further_round_begins_when_patience_is_at_an_end(monkeypatch):
    clock = Clock(monkeypatch)
    times = timing.take_turns({"fused": clock.contender("fused", 6.0)}, 10)
    assert len(times["fused"]) == timing.FEWEST == 3
    assert len(timing.take_turns({"fused": clock.contender("fused", 0.1)}, 10)["fused"]) == 10


def test_a_turn_on_a_gpu_is_many_calls_between_two_waits(monkeypatch):
    clock = Clock(monkeypatch)
    waits = []
    monkeypatch.setattr(timing, "wait_for", lambda device: waits.append((device, len(clock.ran))))
    times = timing.take_turns({"fused": clock.contender("fused", 0.01), "eager": clock.contender("e", 1.0)}, 1, "cuda")
    assert times == {"fused": [pytest.approx(0.01)], "eager": [1.0]}
    assert clock.ran == ["fused"] * (1 + 5) + ["e"]  # one that tells how many, and those
    assert waits == [("cuda", calls) for calls in (0, 1, 1, 6, 6, 7)]


def test_nothing_is_rounded_to_tensor_float_32_while_contenders_run(monkeypatch):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, seen = (cudnn.allow_tf32, matmul.allow_tf32), []

    def look(*given, **options):
        seen.append((cudnn.allow_tf32, matmul.allow_tf32))
        return functional.lista(*given, **options)

    monkeypatch.setattr(unrolled, "contender", lambda name, case: contenders.Contender(look))
    row = unrolled.measure(SMALL["line"], iterations=2, repeats=1)
    assert set(seen) == {(False, False)} and before[0]
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before and "predicted_seconds" not in row


def test_a_baseline_that_takes_theta_as_a_number_waits_for_no_gpu(monkeypatch):
    task, given = cases.problem(SMALL["picture"], 0.1, 2), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: "on the CPU")
    for reads in (True, False):
        entry = contenders.Contender(lambda *args, **options: given.append(args[3]), reads_theta=reads)
        contenders.call(entry, task, "forward")()
    assert given[0] == "on the CPU" and given[1] is task.theta


def test_the_ratio_is_that_to_the_fastest_baseline():
    found = {name: timing.summary(times) for name, times in {"fused": [1, 2, 9], "a": [8], "b": [5, 6, 6, 7]}.items()}
    assert found["fused"]["median"] == 2 and found["b"]["iqr"] == pytest.approx(0.5)
    assert timing.fastest(found) == "b" and timing.ratio(found) == 3


def test_limits_are_rates_of_a_product_and_of_copies():
    threads = torch.get_num_threads()
    found = timing.limits(1, size=128, mebibytes=32)
    assert torch.get_num_threads() == threads
    assert found["threads"] == 1 and found["dtype"] == "float32"
    assert 0.1 < found["gemm_gflops"] < 1e5
    assert 0.1 < found["copy_gbs"] < 1e4 and 0.1 < found["new_copy_gbs"] < 1e4


def test_measure_gives_a_row_of_its_case():
    case = SMALL["picture"]
    row = unrolled.measure(
        case, iterations=3, repeats=2, mode="training", threads=1, setting="random", baselines=contenders.BASELINES[:3]
    )
    assert (row["case"], row["setting"], row["iterations"], row["threads"]) == ("picture", "random", 3, 1)
    assert row["ratio"] == pytest.approx(
        min(row["contenders"][name]["median"] for name in contenders.BASELINES[:3])
        / row["contenders"]["fused"]["median"]
    )
    dense, true = cases.problem(case, 0.1, 3, "random").operations("training")
    seconds = row["contenders"]["fused"]["median"]
    assert row["dense_gflops"] == pytest.approx(dense / seconds / 1e9)
    assert row["true_gflops"] == pytest.approx(true / seconds / 1e9)
    assert row["mean_density"] > row["density"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_measure_in_other_dtypes(dtype):
    for iterations in (1, 2):
        row = unrolled.measure(SMALL["matrix"], iterations=iterations, repeats=1, dtype=dtype)
        assert row["dtype"] == str(dtype).split(".")[1] and row["ratio"] > 0


def test_two_threads_are_compared_with_one():
    threads = torch.get_num_threads()
    row = unrolled.two_threads(SMALL["picture"], repeats=2)
    times = {name: entry["median"] for name, entry in row["contenders"].items()}
    assert row["ratio"] == times["one thread"] / times["fused"] and torch.get_num_threads() == threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak cannot be reset")
def test_a_child_measures_a_known_allocation():
    code = (
        "import torch; from benchmarks.memory import peak_above; torch.ones(2**26); "  # a larger peak before it
        "print(peak_above(lambda: torch.ones(2**24).add(1)))"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=program.ROOT, capture_output=True, text=True, check=True)
    assert int(child.stdout) == pytest.approx(2 * 2**26, rel=0.05)


def test_memory_of_a_training_step_is_measured_in_a_child():
    case = replace(SMALL["picture"], batch=8, spatial=(64, 64))
    row = memory.measure(case, iterations=3, baselines=("eager", "compile"))
    assert set(row["contenders"]) == {"fused", "eager"} and row["code_bytes"] == 8 * 8 * 64 * 64 * 4
    # Backward through plain PyTorch keeps several tensors of a code's size for each iteration.
    assert row["contenders"]["eager"]["median"] > 3 * 2 * row["code_bytes"]
    assert row["ratio"] == row["contenders"]["eager"]["median"] / row["contenders"]["fused"]["median"]


def test_a_child_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="measures the memory of eager failed: it ended with status 1"):
        memory.in_child(cases.problem(SMALL["line"], 0.1, 2), "eager")


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("name", operators.OPERATORS)
def test_an_operator_is_compared_with_eager(name, mode):
    case = SMALL["picture"] if name in operators.CONVOLUTIONAL else None
    row = operators.measure(name, mode, case=case, shape=(2, 4, 8, 8), repeats=2)
    seconds = row["contenders"]["fused"]["median"]
    u, code, signal = 4 * 2 * 4 * 8 * 8, 4 * 2 * 8 * 24 * 24, 4 * 2 * 24 * 24
    moved = {
        "soft_threshold": (2 * u, 3 * u),  # reads u, writes x; reads g and x, writes gu
        "shrink": (2 * u, 3 * u),
        "l1_penalty": (u, 2 * u),
        "conv_soft_threshold": (signal + code, 2 * (code + signal)),
        "lista_step": (2 * code + signal, 4 * code + 2 * signal),
    }
    assert row["gbs"] == pytest.approx(moved[name][mode == "backward"] / seconds / 1e9)
    assert ("dense_gflops" in row) == (case is not None) and "eager" in row["contenders"]


def test_the_operators_of_a_layer_call_are_found():
    layer, tiny = operators.LAYERS["LISTAConv"](), torch.randn(1, 1, 6, 6)
    with torch.no_grad(), operators.Recorder() as recorder:
        codes = layer(tiny)
    ((operator, args, kwargs),) = recorder.calls
    assert operator.overloadpacket is torch.ops.dsc_ops.lista
    assert torch.equal(operator.overloadpacket(*args, **kwargs)[0], codes)


@pytest.mark.parametrize("name", operators.LAYERS)
def test_a_layer_call_is_timed_beside_its_operator(name, monkeypatch):
    clock = itertools.count(1)

    def single(statement: str, seconds: float, **scope) -> list[float]:
        """Runs the statement; the layer takes 10, 20, 50 us, the operator 4, 5, 6."""
        exec(statement, scope)
        turn = next(clock)
        return [{1: 10e-6, 2: 4e-6, 3: 20e-6, 4: 5e-6, 5: 50e-6, 6: 6e-6}[turn]]

    monkeypatch.setattr(operators, "single", single)
    row = operators.overhead(name, rounds=3)
    assert row["microseconds"] == pytest.approx({"layer": 20, "operator": 5}) and row["added"] == pytest.approx(15)


@pytest.mark.parametrize("name", csc.BLOCKS)
def test_a_csc_block_is_compared_with_its_plain_writing(name):
    row = csc.measure(name, "plain", "training", repeats=1, batch=1)
    times = {way: entry["median"] for way, entry in row["contenders"].items()}
    assert times.keys() == {"fused", "plain"} and row["ratio"] == times["plain"] / times["fused"]
    made = csc.BLOCKS[name].make(1, "cpu")
    assert {"fused", *csc.BLOCKS[name].baselines} == made.keys()
    for baseline in csc.BLOCKS[name].baselines[1:]:
        assert all(gradient.isfinite().all() for gradient in made[baseline]())


def test_an_sdnet_layer_follows_its_dictionary_in_each_step(monkeypatch):
    followed, follow = [], csc.CSCConv._follow
    monkeypatch.setattr(csc.CSCConv, "_follow", lambda layer, atoms: followed.append(follow(layer, atoms)))
    steps = csc.BLOCKS["sdnet-3-64, K=2"].make(1, "cpu")
    for count in (1, 2):
        steps["fused"]()
        assert len(followed) == count
    steps["plain"]()
    assert len(followed) == 2


def test_a_csc_block_that_differs_is_not_timed(monkeypatch):
    definition = csc.reference.csc_conv
    monkeypatch.setattr(csc.reference, "csc_conv", lambda y, d, lam, *given: definition(y, d, 2 * lam, *given))
    with pytest.raises(RuntimeError, match="plain and fused differ by"):
        csc.measure("sdnet-3-64, K=2", "plain", "training", repeats=1, batch=2)


def test_csc_rows_are_in_the_plan_and_named(small, monkeypatch, capsys):
    monkeypatch.setattr(csc, "BLOCKS", {name: csc.BLOCKS[name] for name in ("sdnet-3-64, K=2", "res-csc-56")})
    monkeypatch.setattr(memory, "ask", lambda module, name, way, *given: 2**20 * (1 + len(way)))
    monkeypatch.setattr(csc, "take_turns", lambda calls, repeats, device: {name: [1.0 + len(name)] for name in calls})
    monkeypatch.setattr(csc, "warm_up", lambda calls: None)
    assert program.main(["--sections", "csc"]) == 0
    rows = json.loads((small / "runs" / "benchmarks.json").read_text())["rows"]
    assert len({run.identity(row) for row in rows}) == len(rows) == 8
    printed = capsys.readouterr().out
    assert "sdnet-3-64, K=2 over conv+relu      memory" in printed and "over resnet" in printed
    assert "10.0 MiB" in printed and "csc" not in {step.section for step in run.steps(run.Plan().quick())}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak cannot be reset")
def test_memory_of_a_csc_block_is_measured_in_a_child():
    batch = 64
    # Convolution and ReLU keep their result.
    assert csc.bytes_of("sdnet-3-64, K=2", "conv+relu", batch, 1, "cpu") > batch * 64 * 32 * 32 * 4


def test_fista_needs_as_many_iterations_as_it_says():
    task = peers.lasso(24)
    best = task.objective(peers.fista(functional.ista, task, 100))
    count = peers.fista_needs(task, 1.05 * best)
    reached = [task.objective(peers.fista(functional.ista, task, k)) <= 1.05 * best for k in (count - 1, count)]
    assert reached == [False, True]


def test_without_sporco_the_peers_are_two(monkeypatch):
    monkeypatch.setitem(sys.modules, "sporco", None)
    row = peers.measure(size=16, above=0.1, repeats=1, iterations=30)
    assert set(row["contenders"]) == {"fused", "eager"} and "dsc_ops[benchmark]" in row["left_out"]["sporco"]
    for entry in row["contenders"].values():
        assert entry["above_best"] <= 0.1 * (1 + 1e-3)


def test_sporco_solves_the_same_problem():
    pytest.importorskip("sporco", reason="the peer needs pip install dsc_ops[test]")
    task = peers.lasso(24)
    best = task.objective(peers.fista(functional.ista, task, 1000))
    sporco = task.objective(next(peers.sporco_codes(task, 1000)))
    assert sporco == pytest.approx(best, rel=1e-3)


def test_a_whole_plan_measures_every_case_as_agreed():
    found = [step.options for step in run.steps(run.Plan()) if step.section == "cases"]
    told = {(step["case"].name, step["setting"], step["density"], step["iterations"], step["mode"]) for step in found}
    assert len(told) == len(found)
    for name in SHAPES:
        for iterations in (1, 10):
            for mode in contenders.MODES:
                assert {(name, "photographs", p, iterations, mode) for p in cases.DENSITIES} <= told
                assert (name, "random", 0.1, iterations, mode) in told
    assert all(tuple(step["baselines"]) == contenders.BASELINES for step in found)
    sweep = [step.options["iterations"] for step in run.steps(run.Plan()) if "memory denoise-gray" in str(step)]
    assert sorted(sweep) == [1, 2, 5, 10, 20]


def test_a_quick_plan_is_the_part_that_the_guard_compares():
    plan = run.Plan().quick()
    assert {step.section for step in run.steps(plan)} <= {"cases", "threads", "memory", "operators"}
    assert "compile" not in plan.baselines and (plan.densities, plan.iterations) == ((0.1,), (10,))
    assert len([step for step in run.steps(plan) if step.section == "cases"]) == 2 * len(SHAPES)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small shapes, files in a folder of the test."""
    monkeypatch.setattr(cases, "CASES", SMALL)
    monkeypatch.setattr(run, "SWEPT", ("picture",))
    best = {"threads": 1, "dtype": "float32", "gemm_gflops": 1.0, "copy_gbs": 1.0, "new_copy_gbs": 1.0}
    monkeypatch.setattr(run, "limits", lambda threads, dtype, device: best)
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(program, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(program, "TRIAL", tmp_path / "runs")
    monkeypatch.setattr(
        operators,
        "overhead",
        lambda name: {"layer": name, "microseconds": {"layer": 2.0, "operator": 1.0}, "added": 1.0},
    )
    # A child process takes seconds: one test measures with it.
    monkeypatch.setattr(memory, "in_child", lambda task, name, threads: 1000 * (1 + len(task.analysis) * len(name)))
    return tmp_path


def test_a_run_writes_one_whole_file_and_its_figures(small, monkeypatch, capsys):
    monkeypatch.setattr(timing, "HOPELESS", float("inf"))  # every contender in every round, whatever else runs here
    threads = torch.get_num_threads()
    arguments = ["--cases", "picture", "line", "--iterations", "2", "1", "--repeats", "3", "--threads", "1"]
    arguments += ["--no-compile", "--densities", "0.1", "0.3", "--memory-iterations", "1", "3"]
    arguments += ["--sections", "cases", "threads", "memory", "calls"]
    assert program.main(arguments) == 0
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in small.iterdir()) == ["runs"]
    assert sorted(path.name for path in (small / "runs").rglob("*.*")) == [
        "benchmarks.json",
        "density.png",
        "memory.png",
        "speedup.png",
    ]
    written = json.loads((small / "runs" / "benchmarks.json").read_text())
    assert written["machine"]["dsc_ops"]["torch"] == torch.__version__ and written["limits"]["threads"] == 1
    assert len({run.identity(row) for row in written["rows"]}) == len(written["rows"])
    rows = [row for row in written["rows"] if row["section"] == "cases"]
    assert len(rows) == 2 * 3 * 2 * 2
    for row in rows:
        fused, other = row["contenders"]["fused"], row["contenders"][row["fastest"]]
        assert len(fused["times"]) == len(other["times"]) == 3
        assert row["ratio"] == pytest.approx(other["median"] / fused["median"])
        # All baselines at the first density of a case, the fastest of them at the others.
        first = (row["setting"], row["density_asked"]) == ("photographs", 0.1)
        assert first or len(row["contenders"]) == 2
    printed = capsys.readouterr().out
    assert printed.count("picture") == 2 * 3 * 2 + 3 and "there is one thread" in printed and "adds 1.0 us" in printed

    (small / "runs" / "performance" / "memory.png").unlink()
    assert program.main(["--draw", str(small / "runs" / "benchmarks.json")]) == 0
    assert sorted(path.name for path in (small / "figures").iterdir()) == ["density.png", "memory.png", "speedup.png"]


def test_a_row_that_fails_costs_no_other(small, monkeypatch, capsys):
    def fail(case, **options):
        raise RuntimeError("it was killed")

    monkeypatch.setattr(memory, "measure", fail)
    arguments = ["--cases", "line", "--sections", "memory", "calls", "--output", str(small / "new" / "x.json")]
    assert program.main(arguments) == 1
    written = json.loads((small / "new" / "x.json").read_text())
    assert [row["section"] for row in written["rows"]] == ["calls"] * len(operators.LAYERS)
    assert len(written["failed"]) == 1 and "FAILED  memory line K=10 p=0.1: it was killed" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    write_whole(path, "old")
    with pytest.raises(TypeError):
        run.write(path, {"rows": [object()]})
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_results_are_read_as_they_were_written(tmp_path):
    results = {"machine": {"cores": 2}, "failed": [], "rows": [{"a": 1.5, "b": [1, 2]}, {"a": None}]}
    run.write(tmp_path / "x.json", results)
    assert run.read(tmp_path / "x.json") == results
    assert '{"a": 1.5, "b": [1, 2]},\n' in (tmp_path / "x.json").read_text()


def rows_of(*medians: dict[str, float]) -> list[run.Step]:
    """A step that measures these medians, one after the other."""
    left = list(medians)

    def measured() -> run.Row:
        found = {name: {"median": value, "iqr": 0} for name, value in left.pop(0).items()}
        return {"case": "a", "contenders": found, "fastest": timing.fastest(found), "ratio": timing.ratio(found)}

    return [run.Step("cases", measured, {})]


def committed(**medians: float) -> dict:
    return {"machine": {}, "rows": [step.run() for step in rows_of(medians)]}


@pytest.mark.parametrize(
    "measured, losses",
    [
        ([{"fused": 1, "eager": 10}], 0),
        ([{"fused": 2, "eager": 20}], 0),  # a slower machine, the same ratio
        ([{"fused": 1, "eager": 8.6}], 0),
        ([{"fused": 1, "eager": 8.4}, {"fused": 1, "eager": 9}], 0),  # once is no loss
        ([{"fused": 1, "eager": 8.4}, {"fused": 1, "eager": 8.4}], 1),
        ([{"fused": 1, "eager": 8.4, "new": 5}, {"fused": 1, "eager": 9, "new": 4}], 1),  # a faster baseline is one
        ([{"fused": 1, "new": 5}], 0),  # nothing in common
    ],
)
def test_the_guard_tells_a_lasting_loss_of_ratio(measured, losses):
    said = []
    # torch.compile was the fastest when the results were committed; the guard does not compile.
    found = check(committed(fused=1, eager=10, compile=5), rows_of(*measured), said.append)
    assert len(found) == losses
    assert said[-1].endswith(f"{losses} lost more than 15%.")


def test_the_better_of_two_measurements_counts():
    (loss,) = check(committed(fused=1, eager=10), rows_of({"fused": 1, "eager": 8.4}, {"fused": 1, "eager": 7}), print)
    assert "from 10.00 to 8.40" in loss


def test_what_was_lost_is_measured_again_after_all_others():
    said = []
    planned = rows_of({"fused": 1, "eager": 8}, {"fused": 1, "eager": 9}) + rows_of({"fused": 1, "eager": 10})
    assert check(committed(fused=1, eager=10), planned, said.append) == []
    assert ["8.00", "10.00", "9.00"] == [line.split("ratio ")[1].partition(",")[0] for line in said[:3]]


def test_the_guard_compares_only_the_same_measurement():
    other = committed(fused=1, eager=100)
    other["rows"][0]["threads"] = 7
    said = []
    assert check(other, rows_of({"fused": 1, "eager": 1}), said.append) == []
    assert "nothing committed to compare with" in said[0] and said[1].startswith("0 ratios")


def test_the_guards_exit_status(small, monkeypatch, capsys):
    arguments = ["--check", "--sections", "cases", "--cases", "line"]
    assert program.main(arguments) == 0
    name = machine_name(machine())
    assert f"no results are committed for this kind of machine ({name})" in capsys.readouterr().out

    run.write(small / "results" / f"{name}.json", committed(fused=1, eager=10))
    monkeypatch.setattr(run, "steps", lambda plan: rows_of({"fused": 1, "eager": 9.9}))
    assert program.main(arguments) == 0
    monkeypatch.setattr(run, "steps", lambda plan: rows_of(*[{"fused": 1, "eager": 7.0}] * 2))
    assert program.main(arguments) == 1
    assert "LOSS  cases: the ratio fell from 10.00 to 7.00, by 30%" in capsys.readouterr().out


def test_the_guard_measures_what_a_run_wrote(small, capsys):
    """Rows of a run are found again by the guard, those of torch.compile and of other densities are not looked for."""
    arguments = ["--cases", "line", "--iterations", "2", "--repeats", "1", "--sections", "cases", "memory"]
    output = small / "results" / f"{machine_name(machine())}.json"
    assert program.main([*arguments, "--no-compile", "--output", str(output)]) == 0
    slow = run.read(output)
    for row in slow["rows"]:
        row["contenders"]["fused"]["median"] *= 1000  # so that nothing can be lost
    run.write(output, slow)
    capsys.readouterr()
    assert program.main([*arguments, "--check"]) == 0
    assert "3 ratios compared, 0 lost" in capsys.readouterr().out


def test_a_plan_for_a_gpu_measures_there_what_means_something_there():
    plan = run.Plan().on("cuda")
    assert {step.section for step in run.steps(plan)} == set(run.ON_GPU)
    assert {step.options["device"] for step in run.steps(plan)} == {"cuda"}
    assert run.Plan().on("cpu") == run.Plan()


def test_without_a_gpu_it_is_said_and_nothing_is_measured(small, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--device", "cuda"]) == program.NO_GPU == 3
    assert capsys.readouterr().err.startswith("benchmarks: --device cuda needs a GPU")
    assert list(small.iterdir()) == []


class OnTheCpu(TorchFunctionMode):
    """Whatever is asked of a GPU is done on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        moved = {name: "cpu" if value == "cuda" else value for name, value in (kwargs or {}).items()}
        return function(*("cpu" if isinstance(value, str) and value == "cuda" else value for value in args), **moved)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU whose allocator says 100 bytes and then 350, and which does not exist; a list of what was asked of it."""
    asked = []
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
    )
    answers = {
        "is_available": True,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 100,
        "max_memory_allocated": 350,
    }
    for name, answer in answers.items():

        def reply(device=None, name=name, answer=answer):
            asked.append(name)
            return answer

        monkeypatch.setattr(torch.cuda, name, reply)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: asked.append("torch.accelerator.synchronize"))
    monkeypatch.setattr(timing, "TURN", 1e-3)
    with OnTheCpu():
        yield asked


def test_a_run_on_a_gpu_from_end_to_end(small, pretended_gpu, capsys):
    arguments = ["--device", "cuda", "--cases", "picture", "matrix", "--no-compile", "--densities", "0.1"]
    arguments += ["--settings", "photographs", "--iterations", "3", "--memory-iterations", "3", "--repeats", "1"]
    arguments += ["--sections", "cases", "memory", "calls"]
    assert program.main(arguments) == 0
    written = json.loads((small / "runs" / "benchmarks.json").read_text())
    assert written["machine"]["name"] == "nvidia-h100-80gb-hbm3"
    assert written["machine"]["gpu"]["allow_tf32"] is False and written["machine"]["gpu"]["capability"] == "9.0"
    assert {row["section"] for row in written["rows"]} == {"cases", "memory"}  # a GPU has no use for the others
    for row in written["rows"]:
        if row["section"] == "memory":
            assert all(entry["median"] == 250 for entry in row["contenders"].values())
        if row["section"] == "cases":
            known = roofline.DEVICES["H100"]
            options = {"mode": row["mode"], "iterations": 3}
            predicted = roofline.predict(SMALL[row["case"]], row["mean_density"], known, **options)
            assert row["predicted_seconds"] == predicted > 0
    steps = pretended_gpu[pretended_gpu.index("reset_peak_memory_stats") :]
    assert steps[:4] == ["reset_peak_memory_stats", "memory_allocated", "synchronize", "max_memory_allocated"]
    assert "ms predicted" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["soft_threshold", "lista_step"])
def test_operators_are_measured_on_a_gpu(name, pretended_gpu):
    case = SMALL["picture"] if name in operators.CONVOLUTIONAL else None
    row = operators.measure(name, "backward", case=case, shape=(2, 4, 8, 8), repeats=1, device="cuda")
    assert row["ratio"] > 0 and pretended_gpu.count("synchronize") >= 4  # around each turn of two contenders


def test_limits_of_a_gpu_tell_of_tensor_float_32_too(pretended_gpu):
    found = timing.limits(1, device="cuda", size=64, mebibytes=32)
    assert "torch.accelerator.synchronize" in pretended_gpu  # by the timer, before it reads the clock
    assert found["gemm_gflops"] > 0 and found["gemm_tf32_gflops"] > 0 and found["copy_gbs"] > 0
    assert "gemm_tf32_gflops" not in timing.limits(1, torch.float64, "cuda", size=64, mebibytes=32)
    assert torch.backends.cuda.matmul.allow_tf32 is False and torch.backends.cudnn.allow_tf32 is True


def test_a_row_of_a_known_gpu_is_printed_beside_its_prediction():
    timed = {"fused": {"median": 2e-3, "iqr": 0.0}, "eager": {"median": 4e-3, "iqr": 0.0}}
    row = {"section": "cases", "case": "a", "contenders": timed, "fastest": "eager", "ratio": 2.0}
    assert "predicted" not in run.line(row, {})
    assert "roofline 1.00 ms predicted,  50% of it reached" in run.line(row | {"predicted_seconds": 1e-3}, {})


def test_a_machine_is_named_by_its_kind():
    facts = {"processor": "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "cores": 1}
    assert machine_name(facts | {"dsc_ops": {"cpu_capability": "avx512"}}) == "intel-xeon-gold-6338-avx512-1-core"
    assert machine_name(facts | {"dsc_ops": {"cpu_capability": "avx512_bf16"}}) == "intel-xeon-gold-6338-avx512-1-core"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--cases", "nothing"], "--cases"),
        (["--sections", "nothing"], "--sections"),
        (["--repeats", "0"], "--repeats"),
        (["--iterations", "10", "0"], "--iterations"),
        (["--memory-iterations", "0"], "--memory-iterations"),
        (["--densities", "1.5"], "--densities"),
        (["--densities", "0"], "--densities"),
        (["--dtype", "int8"], "--dtype"),
        (["--check", "--quick"], "--check"),
        (["--check", "--output", "x.json"], "--check"),
        (["--draw", "nothing.json"], "--draw"),
        (["--roofline", "--quick"], "--roofline"),
        (["--profile", "--quick"], "--profile"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_wrong_options_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(arguments)
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_help_explains_every_section_and_case(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for word in (*SHAPES, *run.SECTIONS, "--check", "--quick", "15 %", "benchmarks/results"):
        assert word in told


def test_where_the_figures_go_is_in_the_checkout():
    assert program.RESULTS == Path(__file__).parents[1] / "benchmarks" / "results"
    assert program.FIGURES == Path(__file__).parents[1] / "docs" / "performance"
