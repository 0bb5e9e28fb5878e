"""Interleaved timings of the contenders on the cases of :mod:`benchmarks.cases`, printed and written as JSON.

Each contender is warmed up once, then all run in turn, ``repeats`` rounds, in opposite order every other round: what
else the machine does falls on all alike. (A turn of torch.utils.benchmark.Timer costs two more runs each time.)
Only ratios are worth quoting; the spread, the interquartile range over the median, says how far.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, DENSITIES, Case, Problem, problem
from dsc_ops import _library, functional, reference

CONTENDERS: dict[str, Callable[..., Tensor]] = {"fused": functional.lista, "eager": reference.lista}
MODES = ("forward", "training")


def contender(lista: Callable[..., Tensor], task: Problem, mode: str) -> Callable[[], None]:
    """One call: the codes alone, or the codes and the gradients of signal and parameters."""
    arguments = [task.signal, task.dictionary, task.analysis, task.theta]
    if mode == "forward":

        def call() -> None:
            with torch.no_grad():
                lista(*arguments, **task.case.geometry)

        return call

    inputs = [argument.clone().requires_grad_() for argument in arguments]
    with torch.no_grad():
        gradient = torch.ones_like(lista(*arguments, **task.case.geometry))

    def call() -> None:
        torch.autograd.grad(lista(*inputs, **task.case.geometry), inputs, gradient)

    return call


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use this many CPU threads; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Median and interquartile range, in seconds."""
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": statistics.median(times), "iqr": quarters[2] - quarters[0], "times": times}


def measure(
    case: Case,
    *,
    density: float = 0.1,
    iterations: int = 10,
    repeats: int = 5,
    mode: str = "training",
    threads: int | None = None,
) -> dict[str, Any]:
    """Times of all contenders on one case, and their ratio: how many times as long eager takes."""
    with torch_threads(threads):
        task = problem(case, density, iterations)
        calls = {name: contender(lista, task, mode) for name, lista in CONTENDERS.items()}
        times = take_turns(calls, repeats)
        used = torch.get_num_threads()
    contenders = {name: summary(values) for name, values in times.items()}
    return {
        "case": case.name,
        "batch": case.batch,
        "mode": mode,
        "iterations": iterations,
        "threads": used,
        "density_asked": density,
        "density": task.density,
        "contenders": contenders,
        "ratio": contenders["eager"]["median"] / contenders["fused"]["median"],
    }


def machine() -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "dsc_ops": _library.information(),
    }


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(unfinished, path)


HEADER = f"{'case':16}{'batch':>6}{'mode':>10}{'K':>4}{'density':>9}{'fused':>20}{'eager':>20}{'eager/fused':>13}"


def row(result: dict[str, Any]) -> str:
    """One line of the printed table."""
    times = [result["contenders"][name] for name in CONTENDERS]
    cells = "".join(f"{t['median'] * 1e3:11.1f} ms ±{t['iqr'] / t['median']:4.0%}" for t in times)
    start = (
        f"{result['case']:16}{result['batch']:6}{result['mode']:>10}{result['iterations']:4}{result['density']:9.3f}"
    )
    return f"{start}{cells}{result['ratio']:12.2f}x"


def run(
    cases: Iterable[Case], densities: Iterable[float], modes: Iterable[str], **options: Any
) -> list[dict[str, Any]]:
    """Measure and print all combinations."""
    print(HEADER, flush=True)
    results = []
    for case in cases:
        for density in densities:
            for mode in modes:
                results.append(measure(case, density=density, mode=mode, **options))
                print(row(results[-1]), flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time the fused K-step LISTA against the same in plain PyTorch, in turns, and print medians, "
        "spread (interquartile range) and ratio.",
        epilog="cases: " + "; ".join(f"{case.name} ({case.why})" for case in CASES.values()),
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="which cases (default: all)")
    add("--batch", type=int, help="another batch than the cases' own")
    add("--densities", nargs="+", type=float, default=[0.1], metavar="P", help=f"e.g. {DENSITIES} (default: 0.1)")
    add("--iterations", type=int, default=10, help="K (default: 10)")
    add("--modes", nargs="+", choices=MODES, default=["training"], help="codes alone, or with gradients (the default)")
    add("--threads", type=int, help="number of CPU threads (default: torch's)")
    add("--repeats", type=int, default=7, help="rounds of turns (default: 7)")
    add("--output", type=Path, default=Path("runs/benchmarks.json"), help="JSON file (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("batch", "iterations", "threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, it takes at least 1")
    if not all(0 < p < 1 for p in options.densities):
        parser.error(f"--densities is {options.densities}, it takes numbers between 0 and 1")

    cases = [CASES[name].scaled(options.batch or CASES[name].batch) for name in options.cases]
    results = run(
        cases,
        options.densities,
        options.modes,
        iterations=options.iterations,
        repeats=options.repeats,
        threads=options.threads,
    )
    write_whole(options.output, json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    print(f"Written: {options.output}")
