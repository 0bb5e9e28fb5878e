"""lista on packed codes (csrc/core/code_format.h, csrc/cpu/packed*): every shape of plan and every density, tapes that
are damaged, and memory in proportion to the non-zeros."""

from __future__ import annotations

import subprocess
import sys

import numerics
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import Convolution, assert_matches_reference
from torch import Tensor

from dsc_ops import functional, reference

ops = torch.ops.dsc_ops
DENSITIES = (0.0, 1e-3, 0.1, 0.5, 1.0)


def weights(case: Convolution, *leading: int) -> Tensor:
    """Weights with which a few iterations keep codes of any density within bounds."""
    group_atoms, signal_channels = case.atoms // case.groups, case.channels // case.groups
    return case.weight(*leading) / (1 + group_atoms / signal_channels) ** 0.5


def thresholds(case: Convolution, arguments: dict, options: dict, iterations: int, density: float) -> Tensor:
    """theta (iterations, M), another for each atom, with which the code after each iteration has this density.

    Each threshold lies in the widest gap near the quantile, so that no entry is within rounding of it.
    """
    y, dictionary, analysis, x0 = (arguments.get(name) for name in ("y", "dictionary", "analysis", "x0"))
    momentum = reference.momentum_weights(options.get("momentum"), iterations)
    one_sided, axes = options.get("one_sided", False), [1] * len(case.size)
    result, x, before = [], x0, x0
    for k in range(iterations):
        weight = analysis[k] if analysis.dim() > dictionary.dim() else analysis
        if x is None:
            u = reference.analysis(y, weight, **case.geometry)
        else:
            z = x + momentum[k] * (x - before) if momentum else x
            residual = y - reference.synthesis(z, dictionary, case.size, **case.geometry)
            u = z + reference.analysis(residual, weight, **case.geometry)
        factor = 1 + 0.2 * torch.rand(case.atoms, dtype=torch.float64)
        ratio = u / factor.view(-1, *axes)
        values = torch.from_numpy(np.sort((ratio if one_sided else ratio.abs()).flatten().numpy()))
        n = values.numel()
        if density == 0 or n < 2:
            theta = 2 * values[-1].abs() + 1
        elif density == 1:
            theta = values[0] / 2 if not one_sided else values[0] - 0.1
        else:
            middle, window = round((1 - density) * n), max(3, n // 400)
            low, high = max(0, min(middle - window, n - 2)), max(2, min(middle + window, n))
            gaps = values[low:high].diff()
            at = low + int(gaps.argmax())
            theta = (values[at] + values[at + 1]) / 2
        result.append(theta * factor)
        start = torch.zeros_like(u) if x is None else x
        before, x = start, reference.soft_threshold(u, result[-1], one_sided=one_sided)
    return torch.stack(result)


@numerics.remembered
def problem(case: Convolution, density: float, iterations: int = 3, *, tied=False, x0=False, **options) -> tuple:
    """Arguments and options of lista, with codes of the given density."""
    y, dictionary = case.signal(), weights(case)
    arguments = dict(y=y, dictionary=dictionary)
    arguments["analysis"] = dictionary * 0.9 if tied else weights(case, iterations)
    if x0:
        arguments["x0"] = case.code(density)
    arguments["theta"] = thresholds(case, arguments, options, iterations, density)
    return arguments, case.geometry | options


def check(case: Convolution, density: float, dtype=torch.float64, iterations=3, **kind) -> None:
    arguments, options = problem(case, density, iterations, **kind)
    codes = assert_matches_reference(functional.lista, reference.lista, arguments, options, dtype)
    reached = (codes != 0).double().mean().item()
    assert reached == pytest.approx(density, abs=3 / codes.numel() + 0.005), "the thresholds miss the density"


# What a plan (csrc/cpu/packed.cpp) makes of them, in float64 on the levels with vectors of 2, 4 and 8 values:
CASES = {
    "in place": Convolution(2, 1, 24, (19, 13), (8, 3), padding=1),  # columns of a patch are whole vectors
    "copied": Convolution(2, 3, 17, (14, 15), (3, 3), padding=1, dilation=(2, 1)),
    "one pixel": Convolution(2, 3, 40, (3, 3), (3, 3)),
    "chunks": Convolution(1, 8, 40, (12, 11), (5, 5), padding=2),  # copied, not by atoms
    "chunks in place": Convolution(1, 8, 36, (11, 12), (5, 7), padding=(1, 3)),
    "by atoms": Convolution(1, 8, 230, (9, 9), (3, 3), padding=1),  # on every level
    "by atoms, copied": Convolution(1, 3, 260, (13, 9), (3, 3), padding=1, dilation=2, stride=(1, 2)),
    "by atoms in place": Convolution(1, 8, 240, (8, 9), (4, 3)),
    "some by atoms": Convolution(2, 8, 130, (10, 9), (3, 3)),
    "63 atoms": Convolution(1, 2, 63, (9, 10), (3, 3)),
    "64 atoms": Convolution(1, 2, 64, (10, 9), (3, 3)),
    "65 atoms": Convolution(2, 2, 65, (9, 10), (3, 3)),
    "192 atoms": Convolution(1, 1, 192, (11, 10), (5, 5)),
    "groups": Convolution(3, 6, 21, (11, 12), (4, 3), groups=3, padding=2),
    "groups by atoms": Convolution(1, 16, 460, (7, 6), (3, 3), groups=2, padding=1),
    "depthwise": Convolution(2, 5, 5, (12, 13), (3, 5), groups=5, padding=(1, 2)),
    "strides": Convolution(2, 3, 33, (21, 26), (5, 4), stride=(2, 3), padding=(1, 2)),
    "gaps": Convolution(2, 2, 20, (20, 21), (2, 2), stride=3),  # signal values that no patch meets
    "1-D": Convolution(2, 1, 30, (301,), (33,), padding=16),
    "1-D strides": Convolution(3, 4, 20, (210,), (9,), stride=2, dilation=3, groups=2, padding=7),
    "strips": Convolution(1, 3, 64, (34, 31), (7, 7), padding="same"),  # 4 units in one image
    "strips of two images": Convolution(2, 2, 100, (36, 56), (5, 5), padding=2, stride=(1, 2)),
    "kernel beyond strips": Convolution(1, 4, 66, (44, 22), (23, 2), padding=(11, 0)),
    "strips of a 1-D signal": Convolution(1, 1, 64, (3100,), (33,), padding="same"),
    "strips of groups": Convolution(1, 4, 128, (41, 34), (7, 5), groups=2, padding=(3, 2), dilation=(1, 2)),
    "images together": Convolution(11, 2, 40, (9, 8), (3, 3), padding=1),  # and fewer in the last unit
    "many images": Convolution(67, 1, 12, (6, 5), (3, 3)),
    "rows": Convolution(230, 7, 37, (1,), (1,)),  # a unit of 192, and the rest
    "many units": Convolution(40, 1, 70, (16, 15), (3, 3), padding=1),
    "slices": Convolution(19, 8, 64, (19, 17), (5, 5)),  # 16 images, then 3
    "slices and strips": Convolution(17, 8, 60, (25, 24), (5, 5)),  # of 16 images, and of the last one
    "slices of groups": Convolution(9, 16, 300, (16, 16), (3, 3), groups=2),  # 8 images, then 1
    "slices with residuals": Convolution(17, 1, 96, (14, 14), (11, 11), padding=5),  # on the tape
    # with AVX-512 neighbours' patches slide:
    "sliding": Convolution(2, 1, 24, (9, 17), (3, 3), padding=1),  # a patch is one vector
    "sliding by two": Convolution(2, 3, 33, (21, 26), (7, 7), stride=2, padding=3),
    "sliding by vectors": Convolution(2, 4, 30, (12, 13), (4, 4)),  # a column is one, a patch four
    "sliding by almost two": Convolution(1, 1, 30, (36, 12), (31, 2), padding=(3, 1)),
    "long rows": Convolution(1, 1, 100, (5, 210), (7, 7), padding=3),  # of more than a block
    "columns of 2 KiB": Convolution(1, 4, 12, (62, 5), (3, 3), padding=1),
    "column by column": Convolution(2, 3, 70, (13, 21), (3, 3), padding=1),  # float32, as "sliding" is
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@over_cases
@pytest.mark.parametrize("density", DENSITIES)
def test_every_plan_at_every_density(case, density, capability):
    check(case, density, iterations=2)


# Every way in and out of an iteration; two cases each, chosen so that all kinds of plan take part.
KINDS = {
    "tied": dict(tied=True),
    "one-sided": dict(one_sided=True),
    "start": dict(x0=True),
    "fista": dict(momentum="fista", iterations=4),
    "fista from a start": dict(momentum="fista", x0=True, iterations=4, tied=True),
    "momentum": dict(momentum=[7.0, 0.5, 0.0, -0.3], iterations=4, one_sided=True),
    "momentum from a start": dict(momentum=[7.0, 0.5, -0.3], x0=True),
    "momentum that comes late": dict(momentum=[0.0, 0.0, 0.6], x0=True, tied=True),
    "one iteration": dict(iterations=1),
    "one iteration from a start": dict(iterations=1, x0=True, momentum=[0.5]),
}


@pytest.mark.parametrize("density", (1e-3, 0.1, 1.0))
@pytest.mark.parametrize(
    "name",
    [
        "in place",
        "copied",
        "by atoms",
        "65 atoms",
        "groups",
        "1-D strides",
        "strips",
        "images together",
        "slices of groups",
        "rows",
    ],
)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_iteration(kind, name, density, capability):
    check(CASES[name], density, **kind)


# As many images as threads take slices of, which they carry through all iterations alone: the same at all levels.
OWN_SLICES = {
    "own slices": Convolution(66, 3, 64, (20, 20), (3, 3), padding=1),  # of 4 images, then 2
    "own slices of groups": Convolution(64, 4, 96, (21, 20), (5, 5), groups=2),
    "own slices with residuals": Convolution(32, 1, 64, (1110,), (33,), padding=16),  # on the tape
}


@pytest.mark.parametrize("name", OWN_SLICES)
@pytest.mark.parametrize(
    "kind",
    [{}, dict(tied=True, one_sided=True, x0=True), dict(momentum=[7.0, 0.5, -0.3], x0=True)],
    ids=["zero", "start", "momentum"],
)
def test_slices_that_threads_take_alone(kind, name):
    case = OWN_SLICES[name]
    check(case, 0.1, **kind)
    whole, _ = problem(case, 0.1, **kind)
    few = {key: value[:5] if key in ("y", "x0") else value for key, value in whole.items()}
    options = case.geometry | {key: value for key, value in kind.items() if key not in ("tied", "x0")}
    torch.testing.assert_close(  # the same as where threads share a slice
        functional.lista(**whole, **options)[:5], functional.lista(**few, **options), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["in place", "some by atoms", "strips", "many units"])
@pytest.mark.parametrize("one_sided", [False, True])
def test_negative_thresholds(name, one_sided, capability):
    """With a threshold below zero a value comes out larger, also that of an entry near zero."""
    arguments, options = problem(CASES[name], 0.5, 2, one_sided=one_sided, momentum="fista")
    arguments["theta"] = arguments["theta"].abs() * -0.2
    assert_matches_reference(functional.lista, reference.lista, arguments, options, torch.float64)
    arguments["theta"][:, ::3] *= -1  # both signs
    assert_matches_reference(functional.lista, reference.lista, arguments, options, torch.float64)


def test_several_units_share_an_accumulator(capability):
    """A table of atoms of 2 MiB: three units, two shares."""
    check(Convolution(1, 8, 512, (33, 32), (8, 8)), 0.02, iterations=2, tied=True)


def check_mean_error(case: Convolution, density: float, dtype: torch.dtype, **kind) -> None:
    """The root mean square error is at most twice that of eager PyTorch in the same dtype, and rounding (of values
    before the threshold, of which little may be left)."""
    arguments, options = problem(case, density, 2, **kind)
    grad, truth, eager = numerics.expected(reference.lista, arguments, options, dtype)
    ours = numerics.evaluate(functional.lista, arguments, options, dtype, grad)
    for value, baseline, exact, name in zip(ours, eager, truth, ["result", *arguments], strict=True):
        assert value.dtype == dtype and value.shape == exact.shape, name
        allowed = 2 * (baseline.double() - exact).norm() + 16 * torch.finfo(dtype).eps * exact.norm()
        assert (value.double() - exact).norm() <= allowed, name


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    "name",
    [
        "in place",
        "copied",
        "chunks",
        "by atoms",
        "63 atoms",
        "1-D strides",
        "strips",
        "sliding",
        "sliding by two",
        "long rows",
        "column by column",
    ],
)
def test_float32_is_as_exact_as_eager(name, density, capability):
    check_mean_error(CASES[name], density, torch.float32, x0=True, momentum="fista")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "in place",
        "copied",
        "by atoms",
        "65 atoms",
        "images together",
        "long rows",
        "rows",
        "sliding by two",
        "strips of a 1-D signal",
    ],
)
@pytest.mark.parametrize("density", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("kind", [{}, dict(x0=True, momentum="fista", one_sided=True)], ids=["zero", "start"])
def test_half_precision_is_as_exact_as_eager(kind, density, name, dtype, capability):
    """Values near the threshold may fall on either side of it: what that does to the mean is eager's error too."""
    check_mean_error(CASES[name], density, dtype, **kind)


@pytest.mark.parametrize(
    "name", ["in place", "copied", "chunks", "by atoms", "groups", "1-D strides", "strips", "slices"]
)
@pytest.mark.parametrize("x0", [False, True])
@pytest.mark.parametrize("momentum", [None, "fista"])
def test_any_choice_of_gradients(momentum, x0, name, capability):
    """Each gradient alone, and all but one, from zero as from a start: the others change nothing."""
    arguments, options = problem(CASES[name], 0.1, 2, x0=x0, momentum=momentum)
    grad, (_, *truth), _ = numerics.expected(reference.lista, arguments, options, torch.float64)
    expected = dict(zip(arguments, truth, strict=True))
    for wanted in [{name} for name in arguments] + [arguments.keys() - {name} for name in arguments]:
        leaves = {key: value.detach().clone().requires_grad_(key in wanted) for key, value in arguments.items()}
        result = functional.lista(**leaves, **options)
        names = [key for key in leaves if key in wanted]
        for key, got in zip(names, torch.autograd.grad(result, [leaves[key] for key in names], grad), strict=True):
            assert numerics.error(got, expected[key]) <= 1e-12 * max(1, expected[key].abs().max().item()), key


@pytest.mark.supports("numbers", "the same bits for any number of threads")
@pytest.mark.parametrize(
    "name", ["some by atoms", "strips", "strips of groups", "many units", "slices", "one pixel", "rows"]
)
def test_the_same_bits_again_and_with_any_number_of_threads(name, capability):
    check_bits(CASES[name])


@pytest.mark.parametrize("name", OWN_SLICES)
def test_the_same_bits_of_slices_that_threads_take_alone(name):
    check_bits(OWN_SLICES[name])


# Images cut into strips: a thread with four or more of them takes them one by one, else all threads share all.
OWN_IMAGES = {
    "own images": Convolution(4, 2, 100, (36, 56), (5, 5), padding=2, stride=(1, 2)),
    "own images, for two threads": Convolution(9, 1, 64, (42, 41), (7, 7), padding="same"),
    "own signals": Convolution(7, 1, 64, (2100,), (33,), padding=16),  # residuals on the tape
    "own images with few shares": Convolution(4, 3, 128, (50, 50), (11, 11), padding=5),  # eight strips, two shares
    "never own: groups": Convolution(4, 4, 128, (41, 34), (7, 5), groups=2, padding=(3, 2), dilation=(1, 2)),
}


@pytest.mark.supports("numbers", "the same bits for any number of threads")
@pytest.mark.parametrize(
    "kind", [dict(momentum="fista", x0=True), dict(tied=True), dict(iterations=4)], ids=["fista", "tied", "zero"]
)
@pytest.mark.parametrize("name", OWN_IMAGES)
def test_the_same_bits_of_images_that_threads_take_alone(name, kind):
    check(OWN_IMAGES[name], 0.1, **kind)
    check_bits(OWN_IMAGES[name], **kind)


def check_bits(case: Convolution, **kind) -> None:
    """Whatever number of threads a tape was written with, too."""
    arguments, options = problem(case, 0.1, **(kind or dict(momentum="fista", x0=True)))
    before, results = torch.get_num_threads(), []
    try:
        for forward, backward in ((2, 2), (1, 1), (2, 2), (1, 3), (3, 1), (2, 1)):
            leaves = {key: value.float().requires_grad_() for key, value in arguments.items()}
            torch.set_num_threads(forward)
            codes = functional.lista(**leaves, **options)
            grad = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
            torch.set_num_threads(backward)
            results.append([codes, *torch.autograd.grad(codes, list(leaves.values()), grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Neighbours are multiplied in pairs (csrc/cpu/analysis_kernels.h): columns of a kernel three at a time and alone, rows
# of even and odd length, and of more than a block, whose pairs begin in the block before.
PAIRS = {
    "three columns": Convolution(2, 1, 64, (7, 20), (3, 3), padding=1),
    "odd rows": Convolution(2, 3, 64, (13, 17), (5, 5), padding=2),
    "rows of one pixel and a half": Convolution(1, 4, 64, (9, 5), (3, 3)),
    "stride two": Convolution(2, 2, 64, (12, 29), (4, 7), stride=(1, 2)),
    "stride three": Convolution(1, 2, 40, (5, 61), (2, 11), stride=(2, 3), padding=(0, 4)),
    "odd long rows": Convolution(1, 1, 64, (4, 214), (3, 8)),
    "a signal": Convolution(2, 2, 64, (333,), (17,), padding=8),
    "strides along a signal": Convolution(3, 1, 30, (402,), (12,), stride=2),
    "ranges": Convolution(1, 64, 40, (6, 9), (3, 3), padding=1),  # of weights, on every level
    "groups": Convolution(2, 6, 66, (8, 11), (3, 5), groups=3),
}
over_pairs = pytest.mark.parametrize("name", PAIRS)


@over_pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pairs_of_pixels(dtype, name, capability):
    check(PAIRS[name], 0.1, dtype, iterations=2)


@over_pairs
def test_pairs_of_pixels_do_not_depend_on_units(name, capability):
    """The same bits for an image alone, whose rows may be cut into other units, and for a code of it."""
    case = PAIRS[name]
    y, weight = case.signal().float(), case.weight().float()
    together = functional.analysis(torch.cat([y] * 21), weight, **case.geometry)
    alone = functional.analysis(y[-1:], weight, **case.geometry)
    assert torch.equal(together[-1:], alone)


@over_pairs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, name, capability):
    """Differences of weights and of values would be NaN where their products are infinite."""
    case = PAIRS[name]
    y, weight = case.signal(), case.weight()
    weight[1, 0].view(-1)[1] = value
    ours, twin = (m.analysis(y, weight, **case.geometry) for m in (functional, reference))
    assert not twin.isfinite().all() and twin.isfinite().any()
    torch.testing.assert_close(ours, twin, equal_nan=True)


@over_pairs
def test_values_whose_differences_are_not_finite(name, capability):
    case = PAIRS[name]
    y = case.signal().sign().float() * 3e38
    weight = case.weight().float() / 1e4
    ours = functional.analysis(y, weight, **case.geometry)
    twin = reference.analysis(y.double(), weight.double(), **case.geometry)
    assert (ours.double() - twin).abs().max() <= 1e-6 * twin.abs().max()


@pytest.mark.supports("numbers", "NaN and infinity as in eager")
@pytest.mark.parametrize("name", ["in place", "copied", "by atoms", "65 atoms", "groups", "strips", "images together"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_the_reference(value, name, capability):
    case = CASES[name]
    for one_sided in (False, True):
        arguments, options = problem(case, 0.1, 2, one_sided=one_sided)
        y = arguments["y"]
        y[-1, 0].view(-1)[y[-1, 0].numel() // 2] = value
        ours, twin = (m.lista(**arguments, **options) for m in (functional, reference))
        assert not twin.isfinite().all() and twin.isfinite().any()
        torch.testing.assert_close(ours, twin, equal_nan=True)
    only_one = reference.lista(**(arguments | dict(y=y.nan_to_num(0, 0, 0))), **options)
    if case.groups > 1:
        rest = slice(case.atoms // case.groups, None)
        torch.testing.assert_close(ours[:, rest], only_one[:, rest])


@pytest.mark.parametrize("name", ["copied", "by atoms", "65 atoms", "1-D strides", "strips", "sliding", "long rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_in_bfloat16(value, name, capability):
    """To the same places and no further, where taps are multiplied in pairs and their number is odd, too."""
    arguments, options = problem(CASES[name], 0.1, 2)
    arguments["y"][-1, 0].view(-1)[arguments["y"][-1, 0].numel() // 2] = value
    for iterations in (1, 2):
        few = arguments | dict(analysis=arguments["analysis"][:iterations], theta=arguments["theta"][:iterations])
        twin = reference.lista(**few, **options)
        ours = functional.lista(**{key: tensor.bfloat16() for key, tensor in few.items()}, **options)
        assert not twin.isfinite().all() and twin.isfinite().any()
        assert torch.equal(ours.isnan(), twin.isnan()) and torch.equal(ours.isinf(), twin.isinf())


def test_nan_in_a_gradient_stays_where_it_belongs(capability):
    """A NaN in the gradient of one image reaches no other; off the support it reaches nothing."""
    arguments, options = problem(CASES["images together"], 0.1)
    leaves = {name: value.requires_grad_() for name, value in arguments.items()}
    codes = functional.lista(**leaves, **options)
    grad = torch.randn_like(codes)
    clean = torch.autograd.grad(codes, list(leaves.values()), grad, retain_graph=True)
    off = torch.where(codes.detach() == 0, torch.nan, grad)
    for a, b in zip(clean, torch.autograd.grad(codes, list(leaves.values()), off, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b)
    hurt = torch.where(codes.detach() != 0, torch.nan, grad)
    hurt[1:] = grad[1:]
    (grad_y,) = torch.autograd.grad(codes, leaves["y"], hurt)
    assert grad_y[0].isnan().any()
    torch.testing.assert_close(grad_y[1:], clean[0][1:])


# --- the tape ---------------------------------------------------------------------------------------------------------


class Recording:
    """A call of the operator that kept its tape, and where the parts of the tape begin (code_format.h)."""

    def __init__(self, case: Convolution, density: float = 0.1, iterations: int = 2, dtype=torch.float32, **kind):
        arguments, options = problem(case, density, iterations, **kind)
        y, dictionary, analysis, theta = (
            arguments[name].to(dtype) for name in ("y", "dictionary", "analysis", "theta")
        )
        x0 = arguments["x0"].to(dtype) if "x0" in arguments else None
        one = [1] * len(case.size)
        pair = lambda value: [value] * len(one) if isinstance(value, int) else list(value)  # noqa: E731
        analysis = analysis if analysis.dim() > dictionary.dim() else analysis.unsqueeze(0)
        padding = case.kernel[0] // 2 if case.padding == "same" else case.padding
        geometry = [pair(case.stride), pair(padding), pair(case.dilation), case.groups]
        self.arguments = [y, dictionary, analysis, theta, x0, [], *geometry, False]
        self.needs = [True] * 4 + [x0 is not None]
        self.codes, self.tape = self.forward()
        self.pixels = self.codes.numel() // case.atoms * case.groups
        self.iterations, self.atoms = iterations, case.atoms // case.groups
        self.mask_size = (self.atoms + 63) // 64 * 8
        size = 8 if dtype == torch.float64 else 4
        self.capacity = iterations * self.codes.numel()
        self.step_places = self.pixels // 32 + case.groups
        self.first = (self.capacity * size + 2047) // 2048 * 64
        self.masks = self.first + iterations * self.step_places * 16
        self.residuals = self.masks + iterations * self.pixels * self.mask_size
        self.values = self.residuals + iterations * y.numel() * size
        assert self.tape.numel() == self.values + self.capacity * size + 64

    def forward(self) -> tuple[Tensor, Tensor]:
        return ops.lista(*self.arguments, True)

    def backward(self, tape: Tensor) -> tuple[Tensor, ...]:
        return ops.lista_backward(torch.ones_like(self.codes), tape, *self.arguments, self.needs)

    def refuses(self, tape: Tensor) -> None:
        with pytest.raises(RuntimeError, match="tape"):
            self.backward(tape)

    def places(self, tape: Tensor, iteration: int) -> Tensor:
        """(places, 2): first and count of each block."""
        start = self.first + iteration * self.step_places * 16
        return tape[start : start + self.step_places * 16].view(torch.int64).view(-1, 2)

    def mask_words(self, tape: Tensor, iteration: int) -> Tensor:
        start = self.masks + iteration * self.pixels * self.mask_size
        return tape[start : start + self.pixels * self.mask_size].view(self.pixels, -1)


RECORDED = ["in place", "65 atoms", "groups", "some by atoms", "strips"]


def test_a_tape_of_slices_that_threads_take_alone():
    """It is refused where any of them is damaged."""
    call = Recording(OWN_SLICES["own slices"])
    expected = call.backward(call.tape)
    for pixel in (0, call.pixels // 2 // 96 * 96, call.pixels - 400):  # of the first, of another, of the last slice
        tape = call.tape.clone()
        call.mask_words(tape, 1)[pixel : pixel + 96] ^= 1
        call.refuses(tape)
    for got, twin in zip(call.backward(call.tape), expected, strict=True):
        assert torch.equal(got, twin)


@pytest.mark.parametrize("name", RECORDED)
def test_a_tape_of_other_size_or_dtype_is_refused(name, capability):
    call = Recording(CASES[name])
    size = call.tape.numel()
    wrong = [
        call.tape[:-1],
        call.tape[:0],
        torch.zeros(size + 8, dtype=torch.uint8),
        call.tape.view(torch.int8),
        call.tape.float(),
        torch.zeros(2 * size, dtype=torch.uint8)[::2],
        call.tape[: size // 4 * 4].view(torch.float32),
        Recording(CASES[name], iterations=3).tape,
        Recording(CASES[name], dtype=torch.float64).tape,
    ]
    for tape in wrong:
        call.refuses(tape)
    assert all(g.isfinite().all() for g in call.backward(call.tape.clone()))


@pytest.mark.supports("faults", "a damaged tape is refused")
@pytest.mark.parametrize("name", RECORDED)
def test_random_bytes_are_no_tape(name, capability):
    call = Recording(CASES[name])
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        call.refuses(torch.randint(0, 256, (call.tape.numel(),), dtype=torch.uint8, generator=generator))
    call.refuses(torch.full_like(call.tape, 255))


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("iteration", [0, 1])
def test_damaged_places_are_refused(iteration, name, capability):
    call = Recording(CASES[name])
    most = 2**63 - 1
    last = int(call.places(call.tape, iteration)[0, 1])
    damage = [
        (0, -1), (0, -most - 1), (0, most), (0, most - last), (0, call.capacity - last + 1), (0, call.capacity),
        (1, -1), (1, last + 1), (1, last - 1), (1, most), (1, call.capacity + 1), (1, -most - 1),
    ]  # fmt: skip
    for which, value in damage:
        tape = call.tape.clone()
        call.places(tape, iteration)[0, which] = value
        call.refuses(tape)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("iteration", [0, 1])
@pytest.mark.parametrize("last", [False, True])
def test_damaged_masks_are_refused(last, iteration, name, capability):
    call = Recording(CASES[name], density=0.5)
    rows = call.mask_words(call.tape, iteration)
    bits = torch.stack([rows[:, atom // 8] >> atom % 8 & 1 for atom in range(call.atoms)], dim=1).bool()
    pixel = int((bits.any(1) & ~bits.all(1)).nonzero()[-1 if last else 0])
    full, free = int(bits[pixel].nonzero()[0]), int((~bits[pixel]).nonzero()[-1])
    damage = [[full], [free]]  # fewer bits than values, more
    # As many, but one of them that of an atom that is not there.
    damage += [[full, atom] for atom in {call.atoms, 8 * call.mask_size - 1} if atom >= call.atoms]
    for flipped in damage:
        if flipped[-1] >= 8 * call.mask_size:
            continue  # 64 atoms have no bit to spare
        tape = call.tape.clone()
        for atom in flipped:
            call.mask_words(tape, iteration)[pixel, atom // 8] ^= 1 << atom % 8
        call.refuses(tape)


@pytest.mark.parametrize("name", RECORDED[:3])
def test_no_flipped_byte_crashes(name, capability):
    """Refused, or values that are others."""
    call = Recording(CASES[name], x0=True)
    generator = torch.Generator().manual_seed(2)
    refused = 0
    parts = [(call.first, call.masks), (call.masks, call.residuals), (call.residuals, call.tape.numel())]
    for trial in range(60):
        tape = call.tape.clone()
        at = int(torch.randint(*parts[trial % 3], (), generator=generator))
        tape[at] ^= 1 << at % 8
        try:
            gradients = call.backward(tape)
        except RuntimeError as error:
            assert "tape" in str(error)
            refused += 1
        else:
            assert [g.shape for g in gradients] == [a.shape for a in call.arguments[:5]]
    assert refused


@pytest.mark.parametrize("name", ["one pixel", "63 atoms", "gaps"])
def test_equal_calls_give_equal_small_tapes(name, capability):
    call = Recording(CASES[name], 0.1, 1)
    assert call.tape.numel() <= 65536
    for _ in range(3):
        torch.full((call.tape.numel(),), 255, dtype=torch.uint8)  # memory that is handed out again
        codes, tape = call.forward()
        assert torch.equal(codes, call.codes) and torch.equal(tape, call.tape)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_tape_holds_the_codes(density, capability):
    """Masks of the last iteration are the support of the codes; the values of all iterations stand side by side."""
    call = Recording(CASES["in place"], density)
    total, masks = 0, call.mask_words(call.tape, call.iterations - 1)
    bits = torch.cat([(masks >> i & 1).unsqueeze(-1) for i in range(8)], dim=-1).flatten(1)[:, : call.atoms]
    support = (call.codes != 0).transpose(0, 1).flatten(1).T
    assert torch.equal(bits.bool(), support)
    assert bits.sum() == (call.codes != 0).sum()
    for k in range(call.iterations):
        masks = call.mask_words(call.tape, k)
        total += sum(int((masks >> i & 1).sum()) for i in range(8))
    values = call.tape[call.values : call.values + 4 * call.capacity].view(torch.float32)
    kept = values[:total]
    assert (kept != 0).all()
    expected = call.codes.abs().double().sum()
    last = call.places(call.tape, call.iterations - 1)
    block = slice(int(last[0, 0]), int(last[0, 0] + last[0, 1]))
    assert values[block].abs().double().sum() <= expected * (1 + 1e-6)


MEMORY = """
import sys, torch, dsc_ops
from dsc_ops import functional
ops = torch.ops.dsc_ops
def kilobytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
def call(size, theta, train):
    y = torch.randn(1, 1, size, size)
    weight = torch.randn(128, 1, 3, 3, requires_grad=train) / 40
    theta = torch.full((6, 128), theta)
    codes, tape = ops.lista(y, weight, weight[None], theta, None, [], [1, 1], [1, 1], [1, 1], 1, False, True)
    if train:
        torch.autograd.grad(codes, weight, torch.ones(()).expand_as(codes))
    return codes, tape
torch.manual_seed(0)
torch.set_num_threads(1)
call(16, 0.5, True)
before = kilobytes("VmRSS")
codes, tape = call(192, float(sys.argv[1]), False)
after = kilobytes("VmRSS")
print((codes != 0).float().mean().item(), (after - before) * 1024 - codes.numel() * 4, tape.numel())
"""


@pytest.mark.supports("memory", "training takes memory for the tape as codes have non-zeros")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
def test_only_as_much_of_a_tape_is_touched_as_codes_have_values():
    """Resident memory that the tape of a call adds, in a process of its own."""

    def measure(theta: float) -> tuple[float, float]:
        run = subprocess.run([sys.executable, "-c", MEMORY, str(theta)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        density, resident, size = map(float, run.stdout.split())
        return density, resident / size

    density, part = measure(0.0)
    assert density > 0.99 and part > 0.7, "the measurement does not see a full tape"
    density, part = measure(0.19)
    assert 0.001 < density < 0.03 and part < 0.25
    density, part = measure(100.0)
    assert density == 0 and part < 0.25


# --- any geometry -----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw) -> tuple[Convolution, dict, float, int]:
    dims = draw(st.integers(1, 2))
    integers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, dilation, padding = integers(1, 7), integers(1, 3), integers(0, 4)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = tuple(n + draw(st.integers(0, 40 if dims == 2 else 400)) for n in least)
    groups, batch = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    atoms = draw(st.sampled_from([1, 2, 5, 8, 13, 31, 64, 65, 90]))
    channels = draw(st.integers(1, 5))
    case = Convolution(
        batch, groups * channels, groups * atoms, size, kernel, integers(1, 3), padding, dilation, groups
    )
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
    iterations = draw(st.integers(1, 3))
    kind = dict(one_sided=draw(st.booleans()), tied=draw(st.booleans()), x0=draw(st.booleans()))
    kind["momentum"] = draw(st.sampled_from([None, "fista", [0.3, -0.5, 0.8][:iterations]]))
    return case, kind, density, iterations


def cost(case: Convolution) -> float:
    products = case.batch * case.atoms * case.channels / case.groups
    for n, k, s in zip(case.size, case.kernel, case.stride, strict=True):
        products *= (n / s + 1) * k
    return products


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problems().filter(lambda drawn: cost(drawn[0]) < 1e7), st.integers(0, 2**31))
def test_any_geometry(capability, drawn, seed):
    case, kind, density, iterations = drawn
    torch.manual_seed(seed)
    arguments, options = problem(case, density, iterations, **kind)
    assert_matches_reference(functional.lista, reference.lista, arguments, options, torch.float64)
