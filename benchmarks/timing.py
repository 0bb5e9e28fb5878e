"""How times are taken: contenders in turns, medians, ratios, and what the machine can do at most.

All contenders run in turn, in opposite order every other round: what else the machine does falls on all alike. A turn
of less than a second begins with a call that is not timed, since a training loop finds its memory and caches as it left
them, and not as another contender did. (torch.utils.benchmark.Timer takes the times of the limits and of single calls.)
Only ratios are worth quoting; the spread, the interquartile range over the median, says how far.

A GPU works on while Python goes on: there the clock is read when it has finished, and a turn is so many calls that
starting and waiting do not count. float32 is float32: TensorFloat-32 is off, in products and convolutions, for all
contenders; only ``gemm_tf32_gflops`` among the limits has it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FUSED = "fused"  # the contender that all others are baselines of
HOPELESS = 1.5  # a baseline so many times slower than the fastest one is timed once
TURN = 0.05  # seconds of a turn on a GPU, at least
FEWEST, PATIENCE = 3, 15.0  # after so many rounds and seconds no further round is begun
LONG = 1.0  # seconds of a call that needs no other before it


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use this many CPU threads; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_float32() -> Iterator[None]:
    """Let no library of CUDA round float32 to TensorFloat-32; convolutions would by default."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def wait_for(device: str) -> None:
    """Return when the device has finished what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(calls: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call in each round; baselines without a chance to be the fastest run in the first round only."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    on_cpu = torch.device(device).type == "cpu"
    names, begin = list(calls), time.perf_counter()
    for turn in range(repeats):
        if turn >= FEWEST and time.perf_counter() - begin > PATIENCE:
            break
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            if times[name] and times[name][0] < LONG:
                calls[name]()
            times[name].append(seconds_of(calls[name], 1, device))
            if not on_cpu and times[name][-1] < TURN:  # a first call tells how many make a turn
                count = min(1000, math.ceil(TURN / max(times[name][-1], 1e-6)))
                times[name][-1] = seconds_of(calls[name], count, device)
        if turn == 0:
            best = min((times[name][0] for name in names if name != FUSED), default=0)
            names = [name for name in names if name == FUSED or times[name][0] <= HOPELESS * best]
    return times


def seconds_of(call: Callable[[], Any], count: int, device: str) -> float:
    """Seconds of a call, the mean of `count` one after the other."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait_for(device)
    return (time.perf_counter() - start) / count


def summary(times: list[float]) -> dict[str, Any]:
    """Median and interquartile range, in seconds."""
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": statistics.median(times), "iqr": quarters[2] - quarters[0], "times": times}


def fastest(contenders: dict[str, dict[str, Any]]) -> str:
    """The name of the fastest baseline."""
    return min((name for name in contenders if name != FUSED), key=lambda name: contenders[name]["median"])


def ratio(contenders: dict[str, dict[str, Any]]) -> float:
    """How many times as much (time, memory) the best baseline takes as the fused contender."""
    return contenders[fastest(contenders)]["median"] / contenders[FUSED]["median"]


def single(statement: str, seconds: float, **names: Any) -> list[float]:
    """Seconds of one statement, measured again and again, by torch's own timer, with torch's number of threads.

    The timer waits for a GPU before it reads the clock.
    """
    from torch.utils.benchmark import Timer  # brings the tools for C++ extensions along: only where it is needed

    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).times


def limits(
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    size: int | None = None,
    mebibytes: int | None = None,
) -> dict[str, Any]:
    """What the machine does at most, the best of half a second: the product of two large matrices, and large copies.

    A copy counts what it reads and what it writes. ``copy`` is that of a large tensor into another one, ``new_copy``
    that of a tensor of 30 MiB into a new one, as every operator has to make that returns one. A GPU gets larger
    matrices and copies, and tells also what products make with TensorFloat-32, which no contender may use.
    """
    on_cpu = torch.device(device).type == "cpu"
    size, mebibytes = size or (2048 if on_cpu else 8192), mebibytes or (256 if on_cpu else 1024)
    with torch_threads(threads), full_float32():
        used = torch.get_num_threads()
        a, b, c = (torch.rand(size, size, device=device).to(dtype) for _ in range(3))
        source = torch.rand(mebibytes * 2**20 // dtype.itemsize, device=device).to(dtype)
        target = source.clone()

        product = min(single("torch.mm(a, b, out=c)", 0.5, torch=torch, a=a, b=b, c=c))
        rounded = {}
        if not on_cpu and dtype == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = True
            seconds = min(single("torch.mm(a, b, out=c)", 0.5, torch=torch, a=a, b=b, c=c))
            rounded = {"gemm_tf32_gflops": 2 * size**3 / seconds / 1e9}
            torch.backends.cuda.matmul.allow_tf32 = False
        copy = min(single("target.copy_(source)", 0.5, source=source, target=target))
        part = source[: 30 * 2**20 // dtype.itemsize]
        new_copy = min(single("part.clone()", 0.5, part=part))
    return {
        "threads": used,
        "dtype": str(dtype).removeprefix("torch."),
        "gemm_gflops": 2 * size**3 / product / 1e9,
        "copy_gbs": 2 * source.nbytes / copy / 1e9,
        "new_copy_gbs": 2 * part.nbytes / new_copy / 1e9,
    } | rounded
