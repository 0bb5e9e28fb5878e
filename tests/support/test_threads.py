"""Threads of every kind: torch's own, OpenMP's settings, Python's, DataLoader's workers, and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from network import Network, assert_same, gradients, images
from torch.utils.data import DataLoader, Dataset

from dsc_ops import _C, LISTAConv, functional

HERE = Path(__file__).parent


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fastest(call, threads: int) -> float:
    torch.set_num_threads(threads)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


@pytest.mark.supports(
    "threads", "`torch.set_num_threads`: the same bits, and more threads are not slower, large call or small"
)
@pytest.mark.parametrize("size", [8, 96])
def test_two_threads_are_not_slower_than_one(size, restored_threads):
    """On a machine that others use too, so the best of several tries counts, and three times the time of one is slow: a
    thread that is woken for nothing costs a small call ten times as much."""
    layer, y = LISTAConv(3, 32, 5, theta=0.1), torch.randn(2, 3, size, size)

    def step():
        for _ in range(1 if size > 50 else 20):
            layer(y).sum().backward()

    step()
    ratios = []
    for _ in range(5):
        one, two = fastest(step, 1), fastest(step, 2)
        ratios.append(two / one)
        if ratios[-1] < 1.2:
            break
    assert min(ratios) < 3, ratios


def test_more_threads_than_processors_give_the_same_bits(restored_threads):
    torch.manual_seed(1)
    model, y = Network(), images(8, 20, 21)
    results = []
    for threads in (1, 16, 3):
        torch.set_num_threads(threads)
        results.append(gradients(model, model(y).square().sum()))
    for other in results[1:]:
        # PyTorch's own layers in the network may add up in another order; ours do not (test_functional.py).
        assert_same(other, results[0], rtol=1e-4, atol=1e-5)


NESTED = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from concurrent.futures import ThreadPoolExecutor
from network import Network, images
torch.manual_seed(0)
model, y = Network(), images(4, 30, 31)
def norm():
    return float(torch.autograd.grad(model(y).square().sum(), model.codes.dictionary)[0].double().norm())
with ThreadPoolExecutor(3) as pool:
    print([norm()] + list(pool.map(lambda _: norm(), range(3))))
"""


@pytest.mark.supports("threads", "OpenMP's settings: nested, dynamic, bound, more threads than processors")
def test_openmp_settings():
    torch.manual_seed(0)
    model, y = Network(), images(4, 30, 31)
    expected = float(torch.autograd.grad(model(y).square().sum(), model.codes.dictionary)[0].double().norm())
    settings = dict(
        OMP_NUM_THREADS="3,2",
        OMP_MAX_ACTIVE_LEVELS="3",
        OMP_DYNAMIC="true",
        OMP_PROC_BIND="spread",
        OMP_STACKSIZE="512k",
    )
    run = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr[-3000:]
    values = [float(value) for value in run.stdout.strip(" []\n").split(",")]
    assert values == pytest.approx([expected] * 4, rel=1e-4)


# --- Python's threads -------------------------------------------------------------------------------------------------


@pytest.mark.supports("threads", "concurrent calls from Python threads, forward and backward, on shared layers")
def test_concurrent_calls():
    layer = LISTAConv(2, 9, 3, theta=0.02)
    signals = [torch.randn(2, 2, 12 + n, 13) for n in range(12)]

    def work(y):
        codes = layer(y)
        return codes.detach(), *torch.autograd.grad(codes.square().sum(), list(layer.parameters()))

    expected = [work(y) for y in signals]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, alone in zip(pool.map(work, signals), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


def test_kernels_may_be_chosen_while_others_run():
    layer, y = LISTAConv(2, 9, 3, theta=0.02), torch.randn(2, 2, 12, 13)
    expected, before, levels = layer(y).detach(), _C.cpu_capability(), _C.cpu_capabilities()

    def choose(_):
        for level in levels * 50:
            _C.set_cpu_capability(level)

    try:
        with ThreadPoolExecutor(3) as pool:
            chosen = pool.submit(choose, None)
            for got in pool.map(lambda _: layer(y).detach(), range(60)):
                torch.testing.assert_close(got, expected)
            chosen.result()
    finally:
        _C.set_cpu_capability(before)


def test_other_python_threads_go_on_during_a_call():
    """The interpreter lock is given up while a kernel runs."""
    y, weight = torch.randn(4, 3, 160, 160), torch.randn(64, 3, 7, 7) / 40
    waits = [longest_wait(y, weight) for _ in range(3)]  # of a machine that others use the best counts
    assert min(waits) < 0.5, f"the interpreter stood still for {min(waits):.0%} of a call"


def longest_wait(y, weight) -> float:
    """The longest time in which this thread was not run, as a part of a call in another."""
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(functional.lista, y, weight, weight / 9, 0.01, iterations=6, padding=3)
        longest, last = 0.0, time.perf_counter()
        begun = last
        while not call.done():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest / (time.perf_counter() - begun)


# --- workers and processes --------------------------------------------------------------------------------------------


class Encoded(Dataset):
    """Codes that a worker computes."""

    def __init__(self) -> None:
        self.layer = LISTAConv(2, 9, 3, theta=0.02).requires_grad_(False)
        self.signals = torch.randn(8, 2, 40, 41)

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.layer(self.signals[index : index + 1])[0]


@pytest.mark.supports("threads", "DataLoader workers, forked and spawned, after the parent has used its threads")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context):
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    data = Encoded()
    expected = data.layer(data.signals)  # starts the threads that a fork does not take along
    count = 2 if context == "fork" else 1
    loader = DataLoader(data, batch_size=4, num_workers=count, multiprocessing_context=context, timeout=100)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


# In a process of its own: once autograd has had threads of its own, as for a checkpoint in a backward, PyTorch refuses
# to run backward in a fork.
FORK = """
import torch
from dsc_ops import LISTAConv

def gradient():
    return torch.autograd.grad(layer(y).square().sum(), layer.dictionary)[0].norm()

def child(results):
    torch.set_num_threads(1)  # as DataLoader's workers do; GNU's OpenMP does not survive a fork with more
    results.put(float(gradient()))

context = torch.multiprocessing.get_context("fork")
layer, y, results = LISTAConv(2, 9, 3, theta=0.02), torch.randn(2, 2, 40, 41), context.SimpleQueue()
expected = float(gradient())
process = context.Process(target=child, args=(results,), daemon=True)
process.start()
process.join()
assert process.exitcode == 0, process.exitcode
assert abs(results.get() - expected) <= 1e-5 * expected
"""


@pytest.mark.supports("threads", "a forked process that sets its threads to one, as PyTorch's operators ask of it too")
def test_fork():
    if "fork" not in torch.multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


@pytest.mark.supports("threads", "layers in shared memory (`share_memory`)")
def test_shared_memory():
    layer = LISTAConv(2, 4, 3).share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    y = images()
    assert torch.equal(layer(y), layer(y.clone().share_memory_()))
