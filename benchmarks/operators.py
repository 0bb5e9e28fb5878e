"""The operators one by one, forward and backward, against eager and the machine's limits; and what a layer call adds.

Bytes are those that have to be read and written once: of signals, codes and their gradients, not of weights. Beside
``copy`` and ``new_copy`` (:func:`benchmarks.timing.limits`) they tell how near an operator is to a plain copy; dense
operations, how near the convolutions are to a matrix product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dsc_ops
from benchmarks.cases import Case, problem
from benchmarks.contenders import warm_up
from benchmarks.timing import FUSED, fastest, full_float32, ratio, single, summary, take_turns, torch_threads
from dsc_ops import functional, reference

CONVOLUTIONAL = ("conv_soft_threshold", "lista_step")
OPERATORS = ("soft_threshold", "shrink", "l1_penalty", *CONVOLUTIONAL)
ELEMENTWISE = (15, 32, 128, 128)  # 30 MiB in float32: too much for most caches, and still reused by malloc
SURVIVORS = 1.645  # a tenth of standard normal numbers has a larger size


@dataclass(frozen=True)
class Operation:
    """An operator's arguments, the ways to compute it, and how many bytes and dense operations that takes at least."""

    inputs: list[Tensor]
    ways: dict[str, Callable[..., Tensor]]
    moved: dict[str, int]  # by mode
    operations: dict[str, int]


def elementwise(name: str, shape: Sequence[int], device: str) -> Operation:
    """soft_threshold, shrink or l1_penalty on one large code."""
    u = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    theta, size = torch.tensor(SURVIVORS, device=device), u.numel() * u.itemsize
    if name == "l1_penalty":
        ways = {
            FUSED: functional.l1_penalty,
            "eager": reference.l1_penalty,
            "mean": lambda x: x.abs().mean(),
        }
        return Operation([u], ways, {"forward": size, "backward": 2 * size}, {})
    ways = {FUSED: getattr(functional, name), "eager": getattr(reference, name)}
    if name == "soft_threshold":
        ways["softshrink"] = lambda u, theta: (
            theta * F.softshrink(u / theta, 1.0) if torch.is_grad_enabled() else F.softshrink(u, SURVIVORS)
        )
    return Operation([u, theta], ways, {"forward": 2 * size, "backward": 3 * size}, {})


def convolutional(name: str, case: Case, device: str) -> Operation:
    """conv_soft_threshold, or lista_step from the code after ten iterations."""
    task = problem(case, 0.1, 10).to(device)
    geometry, theta = case.geometry, task.theta[0].reshape(())
    signal, code = (tensor.numel() * tensor.itemsize for tensor in (task.signal, task.code))
    product = 2 * task.dictionary[0].numel() * task.code.numel()
    ways = {
        FUSED: partial(getattr(functional, name), **geometry),
        "eager": partial(getattr(reference, name), **geometry),
    }
    if name == "conv_soft_threshold":
        moved = {"forward": signal + code, "backward": 2 * code + 2 * signal}
        operations = {"forward": product, "backward": 2 * product}
        return Operation([task.signal, task.analysis[0], theta], ways, moved, operations)
    moved = {"forward": 2 * code + signal, "backward": 4 * code + 2 * signal}
    operations = {"forward": 2 * product, "backward": 4 * product}
    return Operation([task.code, task.signal, task.dictionary, task.analysis[0], theta], ways, moved, operations)


def calls_of(operation: Operation, mode: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """One call for each way: forward without gradients, or backward alone, of a graph that is kept."""

    def forward(way: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (way(*operation.inputs),)

        return run

    def backward(way: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        inputs = [tensor.detach().requires_grad_() for tensor in operation.inputs]
        result = way(*inputs)
        gradient = torch.ones_like(result)
        return lambda: torch.autograd.grad(result, inputs, gradient, retain_graph=True)

    return {name: (forward if mode == "forward" else backward)(way) for name, way in operation.ways.items()}


def measure(
    name: str,
    mode: str,
    *,
    case: Case | None = None,
    shape: Sequence[int] = ELEMENTWISE,
    repeats: int = 15,
    threads: int | None = None,
    device: str = "cpu",
    baselines: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Times of an operator, forward or backward, against eager; of the convolutional ones on a case."""
    with torch_threads(threads), full_float32():
        operation = convolutional(name, case, device) if case else elementwise(name, shape, device)
        calls = calls_of(operation, mode)
        if baselines is not None:
            calls = {way: run for way, run in calls.items() if way in (FUSED, *baselines)}
        warm_up(calls)
        contenders = {way: summary(times) for way, times in take_turns(calls, repeats, device).items()}
        used = torch.get_num_threads()
    seconds = contenders[FUSED]["median"]
    row = {
        "operator": name,
        "case": case.name if case else "x".join(map(str, shape)),
        "mode": mode,
        "threads": used,
        "contenders": contenders,
        "fastest": fastest(contenders),
        "ratio": ratio(contenders),
        "gbs": operation.moved[mode] / seconds / 1e9,
    }
    if operation.operations:
        row["dense_gflops"] = operation.operations[mode] / seconds / 1e9
    return row


class Recorder(TorchDispatchMode):
    """Notes the calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dsc_ops":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LISTAConv": lambda: dsc_ops.LISTAConv(1, 4, 3, iterations=2),
    "ConvSoftThreshold": lambda: dsc_ops.ConvSoftThreshold(1, 4, 3, padding=1),
    "SoftThreshold": lambda: dsc_ops.SoftThreshold(1),
}


def overhead(name: str, *, rounds: int = 5, seconds: float = 0.1) -> dict[str, Any]:
    """Microseconds that a layer call adds to the call of its operator with the same arguments, on a tiny input.

    Without gradients and on one thread: what is left is Python's share.
    """
    layer, tiny = LAYERS[name](), torch.randn(1, 1, 6, 6)
    with torch_threads(1), torch.no_grad():
        with Recorder() as recorder:
            layer(tiny)
        calls = [(function.overloadpacket, *given) for function, *given in recorder.calls]  # as functional.py calls it
        statements = {
            "layer": "layer(tiny)",
            "operator": "for operator, args, kwargs in calls: operator(*args, **kwargs)",
        }
        scope = {"layer": layer, "tiny": tiny, "calls": calls}
        times: dict[str, list[float]] = {what: [] for what in statements}
        for _ in range(rounds):
            for what, statement in statements.items():
                times[what].append(statistics.median(single(statement, seconds, **scope)) * 1e6)
    medians = {what: statistics.median(values) for what, values in times.items()}
    added = statistics.median(whole - inner for whole, inner in zip(times["layer"], times["operator"], strict=True))
    return {"layer": name, "microseconds": medians, "added": added}
