"""Random problems, and the bound on an error: that of eager PyTorch in the same dtype."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def error(values: Tensor, truth: Tensor) -> float:
    """The largest deviation; infinite where there is a NaN or another shape."""
    if values.shape != truth.shape:
        return float("inf")
    difference = values.double() - truth.double()
    if difference.numel() == 0:
        return 0.0
    return float("inf") if difference.isnan().any() else difference.abs().max().item()


def assert_as_exact_as_eager(ours: list[Tensor], eager: list[Tensor], truth: list[Tensor], names: list[str]) -> None:
    """max |ours - truth| <= 2 max |eager - truth| + rounding of the largest value, result by result.

    Nothing is more exact than float64, so there eager is the truth and the bound is 1e-12 of the largest value.
    """
    for value, baseline, exact, name in zip(ours, eager, truth, names, strict=True):
        assert value.dtype == baseline.dtype and value.shape == exact.shape, name
        scale = exact.abs().max().item() if exact.numel() else 0.0
        if value.dtype == torch.float64:
            rounding = 1e-12 * max(scale, 1.0)
        else:
            rounding = 4 * torch.finfo(value.dtype).eps * max(scale, 1e-3)
        allowed = 2 * error(baseline, exact) + rounding
        got = error(value, exact)
        assert got <= allowed, f"{name}: error {got:.3g}, allowed {allowed:.3g} ({value.dtype})"


def _copy(value):
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return type(value)(map(_copy, value)) if isinstance(value, (list, tuple)) else value


def _key(value):
    """Equal for equal values, tensors among them."""
    if isinstance(value, Tensor):
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b""
        return value.dtype, value.shape, hashlib.blake2b(content).digest()
    if isinstance(value, dict):
        return [(key, _key(item)) for key, item in value.items()]
    return [type(value), *map(_key, value)] if isinstance(value, (list, tuple)) else value


def remembered(function: Callable) -> Callable:
    """The function, which gives its last result once more for the same arguments from the same random state.

    Tests that differ in the instruction set level alone follow each other, and most of their time goes into the
    reference, which is the same for all levels.
    """
    last = ()

    @functools.wraps(function)
    def call(*arguments, **options):
        nonlocal last
        key = [_key(arguments), _key(options), _key(torch.get_rng_state()), torch.get_num_threads()]
        if not last or last[0] != key:
            result = function(*arguments, **options)
            last = key, _copy(result), torch.get_rng_state()
        torch.set_rng_state(last[2])
        return _copy(last[1])

    return call


def evaluate(function: Callable, arguments: dict, options: dict, dtype: torch.dtype, grad: Tensor) -> list[Tensor]:
    """The function's result and the gradient of every tensor argument, with the arguments in one dtype."""
    cast = {
        name: value.to(dtype).detach().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    result = function(**cast, **options)
    leaves = [value for value in cast.values() if isinstance(value, Tensor)]
    gradients = torch.autograd.grad(result, leaves, grad.to(result.dtype), materialize_grads=True)
    return [result.detach(), *gradients]


def assert_matches_reference(function, reference, arguments: dict, options: dict, dtype: torch.dtype) -> Tensor:
    """Result and gradients against the reference in float64, on arguments that the dtype represents exactly.

    Returns the reference's result.
    """
    names = ["result"] + [f"gradient of {k}" for k, v in arguments.items() if isinstance(v, Tensor)]
    grad, truth, eager = expected(reference, arguments, options, dtype)
    assert_as_exact_as_eager(evaluate(function, arguments, options, dtype, grad), eager, truth, names)
    return truth[0]


@remembered
def expected(reference, arguments: dict, options: dict, dtype: torch.dtype) -> tuple[Tensor, list, list]:
    """A random gradient of the result, and with it what the reference has in float64 and in the dtype."""
    rounded = {k: v.to(dtype).double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    grad = torch.randn_like(reference(**rounded, **options)).to(dtype).double()
    truth = evaluate(reference, rounded, options, torch.float64, grad)
    return grad, truth, truth if dtype == torch.float64 else evaluate(reference, arguments, options, dtype, grad)


@dataclass
class Convolution:
    """A convolution's sizes; everything but the batch is one value an axis."""

    batch: int
    channels: int
    atoms: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    @property
    def geometry(self) -> dict:
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)

    def signal(self) -> Tensor:
        return torch.randn(self.batch, self.channels, *self.size, dtype=torch.float64)

    def weight(self, *leading: int) -> Tensor:
        fan_in = self.channels // self.groups
        for k in self.kernel:
            fan_in *= k
        return torch.randn(*leading, self.atoms, self.channels // self.groups, *self.kernel).double() / fan_in**0.5

    def code(self, density: float) -> Tensor:
        from dsc_ops import reference

        empty = reference.analysis(self.signal(), self.weight(), **self.geometry)
        return torch.randn_like(empty) * (torch.rand_like(empty) < density)

    def __str__(self) -> str:
        return "-".join(str(v).replace(" ", "") for v in vars(self).values())


# Each geometry argument on its own and together, in one and two dimensions; sizes that divide nothing; kernels larger
# than the signal; one pixel; depthwise; more atoms and channels than a tile; rows longer than a block of pixels.
CONVOLUTIONS = [
    Convolution(2, 1, 7, (9, 11), (3, 3)),
    Convolution(1, 3, 64, (12, 17), (7, 7), padding="same"),
    Convolution(2, 2, 5, (13, 8), (4, 2), padding=(2, 1)),
    Convolution(3, 4, 6, (15, 10), (3, 5), stride=2, padding=2, groups=2),
    Convolution(1, 6, 6, (7, 19), (3, 3), stride=(1, 3), padding=1, dilation=(2, 1), groups=6),
    Convolution(2, 2, 3, (5, 6), (3, 3), stride=(3, 2), padding=(4, 0), dilation=1),
    Convolution(1, 1, 2, (2, 3), (5, 5), padding=2),
    Convolution(2, 5, 9, (1, 1), (1, 1)),
    Convolution(1, 2, 4, (1, 40), (1, 3), padding=(0, 1)),
    Convolution(1, 2, 4, (40, 1), (3, 1), padding=(1, 0), stride=(2, 1)),
    Convolution(1, 17, 19, (6, 5), (2, 2), dilation=(1, 3)),
    Convolution(1, 1, 3, (4, 230), (1, 5), padding=(0, 2), stride=(5, 1)),
    Convolution(2, 1, 8, (70,), (9,), padding="same"),
    Convolution(1, 3, 4, (601,), (65,), padding=32, stride=2),
    Convolution(3, 4, 4, (23,), (4,), stride=3, padding=1, dilation=2, groups=4),
    Convolution(2, 2, 3, (1,), (1,), stride=4),
]


def random_convolution(generator: torch.Generator) -> Convolution:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator, device="cpu"))

    for _ in itertools.count():
        dims, groups = draw(1, 2), draw(1, 3)
        case = Convolution(
            draw(1, 3),
            groups * draw(1, 3),
            groups * draw(1, 5),
            tuple(draw(1, 20) for _ in range(dims)),
            tuple(draw(1, 6) for _ in range(dims)),
            tuple(draw(1, 4) for _ in range(dims)),
            tuple(draw(0, 4) for _ in range(dims)),
            tuple(draw(1, 3) for _ in range(dims)),
            groups,
        )
        sizes = zip(case.size, case.padding, case.dilation, case.kernel, strict=True)
        if all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in sizes):
            return case
    raise AssertionError("unreachable")
