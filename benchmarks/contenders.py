"""The fused operator and its baselines: PyTorch users write the K iterations in one of these ways.

    eager           dsc_ops.reference.lista: sign(u) relu(|u| - theta)
    softshrink      F.softshrink, on u / theta where theta has a gradient, for F.softshrink takes only a number
    channels_last   the same with signals and weights in this memory format (two spatial axes)
    compile         torch.compile of eager, compiled before the clock starts

The dense case is a matter of matrices, rows being samples, as in :class:`dsc_ops.LISTALinear`: baselines are matrix
products there, and there is no channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Problem
from benchmarks.timing import FUSED
from dsc_ops import functional, reference

BASELINES = ("eager", "softshrink", "channels_last", "compile")
MODES = ("forward", "training")
# Between the results of two contenders, relative to the norm. Rounding moves entries across theta, and the gradient of
# theta is a sum of signs that may all but cancel: this tells different functions from each other, it is no test.
TOLERANCE = 5e-2


def softshrink(u: Tensor, theta: Tensor) -> Tensor:
    return theta * F.softshrink(u / theta, 1.0) if theta.requires_grad else F.softshrink(u, theta.item())


def lista_by_softshrink(
    y: Tensor, dictionary: Tensor, analysis: Tensor, theta: Tensor, *, x0: Tensor | None, **geometry: int
) -> Tensor:
    """As reference.lista."""
    x = x0
    for weight, level in zip(analysis, theta, strict=True):
        if x is None:
            x = softshrink(reference.analysis(y, weight, **geometry), level)
        else:
            residual = y - reference.synthesis(x, dictionary, y.shape[2:], **geometry)
            x = softshrink(x + reference.analysis(residual, weight, **geometry), level)
    return x


def matrix_lista(
    y: Tensor,
    dictionary: Tensor,
    analysis: Tensor,
    theta: Tensor,
    *,
    x0: Tensor | None,
    threshold: Callable[[Tensor, Tensor], Tensor] = lambda u, theta: torch.sign(u) * F.relu(u.abs() - theta),
) -> Tensor:
    """As reference.lista for signals (N, m), a dictionary (d, m), codes (N, d)."""
    x = x0
    for weight, level in zip(analysis, theta, strict=True):
        if x is None:
            x = threshold(y @ weight.t(), level)
        else:
            x = threshold(torch.addmm(x, torch.addmm(y, x, dictionary, alpha=-1), weight.t()), level)
    return x


def fused_matrix_lista(y: Tensor, dictionary: Tensor, analysis: Tensor, theta: Tensor, *, x0: Tensor | None) -> Tensor:
    """What LISTALinear does with rows, and with a first code besides."""

    def signals(rows: Tensor) -> Tensor:
        return rows.t().unsqueeze(0) if rows.is_cuda else rows.unsqueeze(-1)

    start = None if x0 is None else signals(x0)
    weights = dictionary.unsqueeze(-1), analysis.unsqueeze(-1)
    codes = functional.lista(signals(y), *weights, theta, x0=start, iterations=len(analysis))
    return codes.squeeze(0).t().contiguous() if y.is_cuda else codes.squeeze(-1)


@dataclass(frozen=True)
class Contender:
    """A way to compute `lista`, and the memory format of what it is given."""

    lista: Callable[..., Tensor]
    memory_format: torch.memory_format = torch.contiguous_format
    reads_theta: bool = False  # as a number where it has no gradient: it stays on the CPU, lest reading waits for a GPU


@lru_cache(maxsize=1)
def compiled(case: Case) -> Callable[..., Tensor]:
    """Compiled for the shapes of one case; what was compiled for another is thrown away."""
    torch.compiler.reset()
    return torch.compile(reference.lista if case.spatial else matrix_lista, dynamic=False)


def contender(name: str, case: Case) -> Contender | None:
    """A contender by its name; None when there is none of this name for the case."""
    if name == "compile":
        return Contender(compiled(case))
    if case.spatial:
        found = {
            FUSED: Contender(functional.lista),
            "eager": Contender(reference.lista),
            "softshrink": Contender(lista_by_softshrink, reads_theta=True),
        }
        if len(case.spatial) == 2:
            found["channels_last"] = Contender(lista_by_softshrink, torch.channels_last, reads_theta=True)
    else:
        found = {
            FUSED: Contender(fused_matrix_lista),
            "eager": Contender(matrix_lista),
            "softshrink": Contender(
                lambda *given, **options: matrix_lista(*given, **options, threshold=softshrink), reads_theta=True
            ),
        }
    return found.get(name)


def signal_like(tensor: Tensor | None, case: Case, entry: Contender) -> Tensor | None:
    """A signal or a code as the contender takes it: rows in the dense case, else in its memory format."""
    if tensor is None:
        return None
    return tensor.contiguous(memory_format=entry.memory_format) if case.spatial else tensor[0].t().contiguous()


def weight_like(weight: Tensor, case: Case, entry: Contender) -> Tensor:
    """One weight, or one for each iteration, as the contender takes it."""
    if not case.spatial:
        return weight.squeeze(-1)
    if entry.memory_format == torch.contiguous_format:
        return weight
    return weight.movedim(-3, -1).contiguous().movedim(-1, -3)  # channels last, whatever comes first


def call(entry: Contender, task: Problem, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """One call: the codes alone, or the gradients of signal, parameters and first code."""
    case = task.case
    signal, start, gradient = (signal_like(t, case, entry) for t in (task.signal, task.start, task.code))
    weights = [weight_like(weight, case, entry) for weight in (task.dictionary, task.analysis)]
    given = [signal, *weights, task.theta, start]
    geometry = case.geometry if case.spatial else {}
    if mode == "forward":
        given[3] = task.theta.cpu() if entry.reads_theta else task.theta

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (entry.lista(*given[:-1], x0=given[-1], **geometry),)

        return forward

    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in given]
    wanted = [tensor for tensor in inputs if tensor is not None]
    gradient = torch.ones_like(gradient)

    def training() -> tuple[Tensor, ...]:
        codes = entry.lista(*inputs[:-1], x0=inputs[-1], **geometry)
        return torch.autograd.grad(codes, wanted, gradient, allow_unused=True)  # D is, in one step from zero

    return training


def warm_up(calls: dict[str, Callable[[], tuple[Tensor, ...]]], limit: float = TOLERANCE) -> dict[str, str]:
    """Run each once, compare the results with the fused ones, take out what cannot be compiled: name and reason."""
    left_out, truth = {}, None
    for name in list(calls):
        try:
            results = calls[name]()
        except Exception as error:
            if name != "compile":
                raise
            left_out[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            del calls[name]
            continue
        truth = truth or results
        for ours, theirs in zip(truth, results, strict=True):
            if theirs is None:
                continue
            error = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
            if not error <= limit:
                raise RuntimeError(f"{name} and {next(iter(calls))} differ by {error:.1e} of the norm of the result")
    return left_out
