"""The rows of the table of cases: K iterations, forward or with all gradients, by all contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.cases import Case, problem
from benchmarks.contenders import TOLERANCE, call, contender, warm_up
from benchmarks.timing import FUSED, fastest, full_float32, ratio, summary, take_turns, torch_threads

UNROLLED = 10  # the single step starts from the code after so many


def measure(
    case: Case,
    *,
    density: float = 0.1,
    iterations: int = UNROLLED,
    repeats: int = 5,
    mode: str = "training",
    threads: int | None = None,
    setting: str = "photographs",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    baselines: Sequence[str] = ("eager",),
) -> dict[str, Any]:
    """Times of the contenders on one case, and their ratio: how many times as long the fastest baseline takes.

    One iteration is a step from the code after ten; more start from zero.
    """
    with torch_threads(threads), full_float32():
        task = problem(case, density, UNROLLED if iterations == 1 else iterations, setting)
        task = (task.one_step() if iterations == 1 else task).to(dtype).to(device)
        entries = {name: contender(name, case) for name in (FUSED, *baselines)}
        calls = {name: call(entry, task, mode) for name, entry in entries.items() if entry}
        left_out = warm_up(calls, TOLERANCE if dtype.itemsize >= 4 else float("inf"))
        contenders = {name: summary(times) for name, times in take_turns(calls, repeats, device).items()}
        used = torch.get_num_threads()
    dense, true = task.operations(mode)
    seconds = contenders[FUSED]["median"]
    modelled = device != "cpu" and dtype == torch.float32
    known = roofline.device_named(torch.cuda.get_device_name(device)) if modelled else None
    options = {"mode": mode, "iterations": iterations, "from_zero": task.start is None}
    predicted = {"predicted_seconds": roofline.predict(case, task.mean_density, known, **options)} if known else {}
    return {
        "case": case.name,
        "batch": case.batch,
        "setting": setting,
        "mode": mode,
        "iterations": iterations,
        "threads": used,
        "dtype": str(dtype).removeprefix("torch."),
        "density_asked": density,
        "density": task.density,
        "mean_density": task.mean_density,
        "contenders": contenders,
        "left_out": left_out,
        "fastest": fastest(contenders),
        "ratio": ratio(contenders),
        "dense_gflops": dense / seconds / 1e9,
        "true_gflops": true / seconds / 1e9,
    } | predicted


def two_threads(case: Case, *, density: float = 0.1, repeats: int = 5) -> dict[str, Any]:
    """The fused training step with two threads (``fused``) and with one."""
    task = problem(case, density, UNROLLED)
    step = call(contender(FUSED, case), task, "training")

    def with_threads(count: int) -> Callable[[], None]:
        def run() -> None:
            with torch_threads(count):
                step()

        return run

    calls = {FUSED: with_threads(2), "one thread": with_threads(1)}
    for run in calls.values():
        run()
    contenders = {name: summary(times) for name, times in take_turns(calls, repeats).items()}
    return {
        "case": case.name,
        "batch": case.batch,
        "density_asked": density,
        "contenders": contenders,
        "fastest": fastest(contenders),
        "ratio": ratio(contenders),
    }
