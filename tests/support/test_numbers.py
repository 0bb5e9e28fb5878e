"""Numbers at the edges: NaN, infinity, denormals, thresholds of any size, sizes of zero and one, more than 2^31
elements, and the same bits again."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from network import Network, gradients, images
from torch import Tensor

from dsc_ops import LISTAConv1d, LISTALinear, functional, reference

NAN, INFINITY = float("nan"), float("inf")
TINY = 2.0**-140  # a denormal float32
SPECIAL = [NAN, INFINITY, -INFINITY, 1.0, -1.0, 0.0, -0.0, TINY, -TINY, 2.0**-149, 3e38, -3e38, 0.5, -0.5]


def evaluate(module, name: str, arguments: list[Tensor], **options) -> list[Tensor]:
    leaves = [a.clone().requires_grad_() for a in arguments]
    result = getattr(module, name)(*leaves, **options)
    return [result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))]


def compare(name: str, arguments: list[Tensor], **options) -> None:
    """The result as in eager, special values included, and the gradients where no NaN is (see below)."""
    ours, eager = (evaluate(module, name, arguments, **options) for module in (functional, reference))
    torch.testing.assert_close(ours[0], eager[0], equal_nan=True)
    if not eager[0].isnan().any():
        torch.testing.assert_close(ours, eager)


@pytest.mark.supports(
    "numbers", "theta zero, negative (the formula, no proximal operator), denormal, huge, infinite: as in eager"
)
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("theta", [0.0, -0.0, TINY, 0.5, -0.5, -1e30, 1e30, INFINITY])
def test_thresholds_of_any_size(theta, one_sided, capability):
    for special in (True, False):
        u = torch.tensor([v for v in SPECIAL if special or (v == v and abs(v) < INFINITY)] * 5).view(1, 5, -1)
        for t in (torch.tensor(theta), torch.full((5,), theta)):
            compare("soft_threshold", [u, t], one_sided=one_sided)
        if abs(theta) < 1e30:
            compare("shrink", [u, torch.tensor(theta)], activation="elu", one_sided=one_sided)
    y, weight = torch.randn(2, 2, 9), torch.randn(5, 2, 3)
    compare("conv_soft_threshold", [y, weight, torch.full((5,), theta)], one_sided=one_sided)
    if abs(theta) <= 1:
        arguments = [y.double(), weight.double(), weight.double() / 9, torch.full((3, 5), theta).double()]
        compare("lista", arguments, one_sided=one_sided)
    else:
        ours, eager = (
            m.lista(y, weight, weight / 9, theta, iterations=1, one_sided=one_sided) for m in (functional, reference)
        )
        torch.testing.assert_close(ours, eager, equal_nan=True)


@pytest.mark.supports("numbers", "NaN in forward is NaN as in eager; in backward a NaN code counts as a non-zero")
def test_gradient_at_a_nan(capability):
    """Eager hides it: its derivative of |u| at NaN is 0, and that of relu 1."""
    u = torch.tensor([NAN, 2.0, -2.0, 0.1], requires_grad=True)
    for theta in (0.0, 1.0):
        functional.soft_threshold(u, theta).backward(torch.ones(4))
        assert u.grad.tolist() == [1, 1, 1, float(theta == 0)]
        u.grad = None
    y, weight = torch.randn(1, 1, 12), torch.randn(3, 1, 3, requires_grad=True)
    y[0, 0, 6] = NAN
    codes = functional.conv_soft_threshold(y, weight, 0.1)
    assert codes.isnan().sum() == 9 and torch.autograd.grad(codes.sum(), weight)[0].isnan().any()


@pytest.mark.supports("numbers", "denormal float32 values are neither flushed nor made larger, also after a call")
def test_denormals(capability):
    u = torch.tensor([TINY, -TINY, 3 * TINY, 2.0**-149] * 5)
    assert torch.equal(functional.soft_threshold(u, 0.0), u)
    assert torch.equal(functional.soft_threshold(u, TINY), torch.tensor([0.0, 0.0, 2 * TINY, 0.0] * 5))
    weight = torch.ones(3, 1, 1)
    y = u.view(1, 1, -1)
    assert torch.equal(functional.analysis(y, weight), y.expand(1, 3, -1))
    assert torch.equal(functional.synthesis(y.expand(1, 3, -1) / 2, weight, 20), 3 * (y / 2))
    assert torch.equal(functional.lista(y, weight, weight, 0.0, iterations=1), y.expand(1, 3, -1))
    assert (u / 2 > 0).sum() == 10  # the processor still makes denormals


@pytest.mark.supports("numbers", "sizes of one and of zero: as `conv2d`, or refused with the sizes")
@pytest.mark.parametrize("dims", [1, 2])
def test_sizes_of_zero_and_one(dims):
    """Batch, channels, atoms, signal and kernel, each 0, 1 or more."""
    refused = computed = 0
    conv = torch.nn.functional.conv1d if dims == 1 else torch.nn.functional.conv2d
    for batch, channels, atoms, size, kernel in itertools.product(
        (0, 1, 2), (0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 1, 3)
    ):
        y, weight = torch.randn(batch, channels, *[size] * dims), torch.randn(atoms, channels, *[kernel] * dims)
        if 0 in (channels, atoms, size, kernel):
            with pytest.raises(ValueError, match=r"it takes sizes of at least 1|does not fit into y"):
                functional.analysis(y, weight, padding=1)
            refused += 1
            continue
        expected = conv(y, weight, padding=1)
        torch.testing.assert_close(functional.analysis(y, weight, padding=1), expected)
        arguments = [y, weight, weight / 9, torch.full((2, atoms), 0.1)]
        for a, b in zip(*(evaluate(m, "lista", arguments, padding=1) for m in (functional, reference)), strict=True):
            torch.testing.assert_close(a, b)
        computed += 1
    assert refused == 3**5 - 48 and computed == 48


@pytest.mark.supports("numbers", "a dictionary of zeros: codes and gradients of zero, no NaN")
def test_a_dictionary_of_zeros():
    """... has the Lipschitz constant 0, and 1/0 is no step."""
    y, weight = torch.randn(2, 1, 8), torch.zeros(3, 1, 3, requires_grad=True)
    for fast in (False, True):
        codes = functional.ista(y, weight, 0.1, iterations=3, fast=fast)
        assert (codes == 0).all() and (torch.autograd.grad(codes.sum(), weight)[0] == 0).all()
    layers = (LISTAConv1d.from_dictionary(weight), LISTALinear.from_dictionary(weight[:, 0]))
    for layer, signal in zip(layers, (y, y[..., :3]), strict=True):
        assert (layer.analysis == 0).all() and (layer(signal) == 0).all()
    # A geometry that sees nothing but padding.
    assert functional.lipschitz(torch.ones(3, 1, 2), 1, padding=2, stride=3, dilation=2) >= 0
    seen = functional.ista(torch.randn(1, 1, 1), torch.ones(3, 1, 2), 0.1, iterations=2, padding=2, dilation=4)
    assert seen.isfinite().all()


# --- more than 2^31 elements ------------------------------------------------------------------------------------------

HUGE = 2**31 + 2**20


@pytest.mark.supports(
    "numbers", "more than 2^31 elements: shapes, and strides that lead there; a run of that size on request"
)
def test_shapes_of_more_elements_than_an_int32_counts():
    """On tensors without memory."""
    y = torch.empty(64, 3, 4096, 4096, device="meta", requires_grad=True)
    weight, theta = torch.empty(64, 3, 3, 3, device="meta"), torch.empty(64, device="meta")
    for codes in (
        functional.conv_soft_threshold(y, weight, theta, padding=1),
        functional.lista(y, weight, weight, theta, iterations=4, padding=1),
        functional.analysis(y, weight, padding=1),
    ):
        assert codes.shape == (64, 64, 4096, 4096) and codes.numel() == 2**36
        assert functional.synthesis(codes, weight, 4096, padding=1).shape == y.shape
        assert torch.autograd.grad(functional.l1_penalty(codes), y)[0].shape == y.shape


def test_strides_beyond_an_int32(capability):
    """Few elements that lie more than 2^31 apart in memory, of which only their pages are ever touched."""
    try:
        space = torch.empty(HUGE + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this system gives no address space of 4 GiB: {str(error).splitlines()[0]}")
    u = space.as_strided((2, 2, 3, 4), (HUGE, 1024, 4, 1))
    values = torch.randn(u.shape).bfloat16()
    u.copy_(values)
    weight = torch.randn(3, 2, 2, 2).bfloat16()
    for call in (
        lambda y: functional.soft_threshold(y, 0.3),
        lambda y: functional.shrink(y, 0.3, activation="gelu"),
        lambda y: functional.conv_soft_threshold(y, weight, 0.3),
        lambda y: functional.lista(y, weight, weight / 4, 0.1, iterations=3, padding=1),
        functional.l1_penalty,
        functional.density,
    ):
        assert torch.equal(call(u), call(values))


def free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


@pytest.mark.skipif("DSC_OPS_LARGE_TESTS" not in os.environ, reason="takes a minute: set DSC_OPS_LARGE_TESTS=1")
@pytest.mark.skipif(free_memory() < 7 << 30, reason="needs 7 GiB of free memory")
def test_more_elements_than_an_int32_counts():
    """In bfloat16, 4 GiB: what counts and what addresses."""
    pixels = HUGE // 64 + 4
    y = torch.zeros(1, 1, pixels, dtype=torch.bfloat16)
    y[0, 0, -2:] = torch.tensor([3.0, -5.0])
    weight = torch.arange(1.0, 65.0).view(64, 1, 1).bfloat16()
    codes = functional.conv_soft_threshold(y, weight, 0.5)
    assert codes.numel() > 2**31
    assert torch.equal(codes[..., -3:], functional.conv_soft_threshold(y[..., -3:], weight, 0.5))
    assert round(functional.density(codes).item() * codes.numel()) == 128
    codes.fill_(1)
    assert functional.l1_penalty(codes, [1.0]).item() == codes.numel()  # a multiple of 2^8: exact in float32
    assert functional.density(codes) == 1


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.supports("numbers", "the same bits in every run, also under `torch.use_deterministic_algorithms(True)`")
def test_training_again_gives_the_same_bits():
    y, results = images(), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            torch.manual_seed(2)
            model = Network()
            for _ in range(3):
                slopes = gradients(model, model(y).square().sum())
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter -= 0.01 * slopes[name]
            results.append(model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())
