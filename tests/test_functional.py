"""The functions against their plain PyTorch twins: results and gradients for every dtype, layout and geometry."""

from __future__ import annotations

import itertools

import numerics
import pytest
import torch
import torch.nn.functional as F
from numerics import CONVOLUTIONS, DTYPES, Convolution, assert_as_exact_as_eager, assert_matches_reference
from torch import Tensor

from dsc_ops import _composed, functional, reference

ops = torch.ops.dsc_ops


def check(name: str, arguments: dict, options: dict, dtype: torch.dtype) -> None:
    assert_matches_reference(getattr(functional, name), getattr(reference, name), arguments, options, dtype)


# Shapes that divide nothing, planes of more than one run, rows of channels, also longer than a piece, one of each.
ELEMENTWISE_SHAPES = [
    *[(2, 5, 7, 9), (1, 3, 150, 120), (3, 17), (40000, 2), (3, 2500), (2, 1024), (2, 3, 33), (1, 4, 2, 3, 5)],
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("shape", ELEMENTWISE_SHAPES)
def test_soft_threshold_matches_reference(shape, one_sided, dtype, capability):
    theta = torch.rand(shape[1], dtype=torch.float64)
    check("soft_threshold", dict(u=torch.randn(shape), theta=theta), dict(one_sided=one_sided), dtype)
    check("soft_threshold", dict(u=torch.randn(shape), theta=theta[0]), dict(one_sided=one_sided), dtype)


@pytest.mark.parametrize("shape", [(), (6,), (0,), (3, 0, 2), (0, 4), (4, 3, 0, 2)])
def test_elementwise_functions_take_any_shape(shape):
    u = torch.randn(shape, requires_grad=True)
    theta = torch.tensor(0.3, requires_grad=True)
    for function in (functional.soft_threshold, functional.shrink):
        x = function(u, theta)
        assert x.shape == u.shape
        grad_u, grad_theta = torch.autograd.grad(x.sum(), (u, theta))
        assert grad_u.shape == u.shape and grad_theta.shape == ()
        if not u.numel():
            assert grad_theta == 0


@pytest.mark.parametrize("theta, survivors", [(100.0, 0), (0.0, 1.0), (1.6449, 0.1)])
def test_soft_threshold_at_every_density(theta, survivors, capability):
    u = torch.randn(2, 8, 60, 60)
    x = functional.soft_threshold(u, theta)
    assert functional.density(x, 0).item() == pytest.approx(survivors, abs=0.01)
    check("soft_threshold", dict(u=u, theta=torch.full((8,), theta)), {}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("one_sided", [False, True])
def test_shrink_matches_reference(activation, one_sided, dtype, capability):
    options = dict(activation=activation, one_sided=one_sided)
    for shape in ((2, 5, 7, 9), (3, 17)):
        theta = torch.rand(shape[1], dtype=torch.float64)
        check("shrink", dict(u=4 * torch.randn(shape), theta=theta), options, dtype)
        check("shrink", dict(u=4 * torch.randn(shape), theta=theta[0]), options, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 40, 31), (1, 1, 16390), (2, 1500), (70, 30), (2, 1024)])
def test_shrink_of_more_than_a_piece(shape, dtype, capability):
    """Sums of so many terms may cancel: their error is bounded by that of a sum of sizes."""
    u, theta, grad = (x.to(dtype).double() for x in (2 * torch.randn(shape), torch.rand(shape[1]), torch.randn(shape)))
    eps = torch.finfo(dtype).eps
    for activation in ("relu", "mish"):
        results = []
        for module, kind in ((functional, dtype), (reference, torch.float64)):
            leaves = [x.to(kind).requires_grad_() for x in (u, theta)]
            result = module.shrink(*leaves, activation=activation)
            results.append([result.detach(), *torch.autograd.grad(result, leaves, grad.to(kind))])
        (ours, grad_u, grad_theta), (truth, exact_u, exact_theta) = results
        torch.testing.assert_close(ours.double(), truth, rtol=4 * eps, atol=4 * eps)
        torch.testing.assert_close(grad_u.double(), exact_u, rtol=8 * eps, atol=8 * eps)
        sizes = grad.abs().transpose(0, 1).flatten(1).sum(1)
        assert ((grad_theta.double() - exact_theta).abs() <= 8 * eps * sizes).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_half_precision(dtype, capability):
    """Computed in float32 and rounded to the nearest even: subnormal numbers, ties, overflow to infinity, NaN."""
    numbers = torch.arange(-(1 << 15), (1 << 15) + 3).to(torch.int16).view(dtype)
    for theta in (0.0, 2.0**-24, 0.1, -3000.0):
        theta = torch.tensor(theta, dtype=dtype)
        for name in ("soft_threshold", "shrink"):
            u = numbers.clone().requires_grad_()
            result = getattr(functional, name)(u, theta)
            wide = numbers.float().requires_grad_()
            expected = getattr(reference, name)(wide, theta.float())
            torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
            (ours,) = torch.autograd.grad(result, u, numbers)
            (exact,) = torch.autograd.grad(expected, wide, numbers.float())
            torch.testing.assert_close(ours, exact.to(dtype), rtol=0, atol=0, equal_nan=True)
    u = numbers[~numbers.isnan()].requires_grad_()
    (ours,) = torch.autograd.grad(functional.l1_penalty(u[None], [1.0]), u, torch.tensor(1e-3))
    assert torch.equal(ours, (1e-3 * u.float().sign()).to(dtype))


def layouts(x: torch.Tensor):
    """The same values in every kind of memory layout."""
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    yield torch.cat([x[:1], x])[1:]  # an offset into its storage


@pytest.mark.supports("memory", "any strides and memory formats of arguments and incoming gradients")
def test_results_do_not_depend_on_strides(capability):
    case = Convolution(2, 4, 6, (9, 10), (3, 3), stride=2, padding=1, groups=2)
    u, y = torch.randn(2, 5, 7, 9), case.signal().float()
    weight, theta = case.weight().float(), torch.rand(6)
    x = case.code(0.3).float()
    options = case.geometry
    calls = [
        (lambda t: functional.soft_threshold(t, torch.arange(5) / 5), u),
        (lambda t: functional.shrink(t, 0.3, activation="mish"), u),
        (lambda t: functional.analysis(t, weight, **options), y),
        (lambda t: functional.analysis(y, t, **options), weight),
        (lambda t: functional.synthesis(t, weight, (9, 10), **options), x),
        (lambda t: functional.conv_soft_threshold(t, weight, theta, theta, **options), y),
        (lambda t: functional.lista_step(t, y, weight, weight, theta, **options), x),
        (lambda t: functional.lista(t, weight, weight, theta, iterations=3, momentum="fista", **options), y),
        (lambda t: functional.lista(y, t, weight, theta, iterations=3, x0=x, **options), weight),
        (lambda t: functional.l1_penalty(t), u),
    ]
    for call, tensor in calls:
        grad = torch.randn_like(call(tensor))
        plain = None
        for variant in layouts(tensor):
            variant = variant.detach().requires_grad_()
            result = call(variant)
            # Gradients that arrive in another layout than the result's.
            for incoming in layouts(grad) if grad.dim() else (grad,):
                got = (result, *torch.autograd.grad(result, variant, incoming, retain_graph=True))
                plain = plain or got
                for a, b in zip(got, plain, strict=True):
                    torch.testing.assert_close(a, b)


def test_elementwise_results_keep_channels_last():
    u = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert functional.soft_threshold(u, 0.1).is_contiguous(memory_format=torch.channels_last)
    assert functional.shrink(u, 0.1, activation="elu").is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradients_are_understood():
    """sum() sends a gradient of stride zero."""
    case = CONVOLUTIONS[0]
    y, weight = case.signal().requires_grad_(), case.weight().requires_grad_()
    for function in (functional.analysis, reference.analysis):
        function(y, weight).sum().backward()
    torch.testing.assert_close(y.grad / 2, torch.autograd.grad(reference.analysis(y, weight).sum(), y)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_match_reference(case, dtype, capability):
    y, weight, x, options = case.signal(), case.weight(), case.code(0.2), case.geometry
    theta, bias = torch.rand(case.atoms, dtype=torch.float64) / 2, torch.randn(case.atoms, dtype=torch.float64)
    check("analysis", dict(y=y, weight=weight), options, dtype)
    check("synthesis", dict(x=x, weight=weight), options | dict(signal_size=case.size), dtype)
    check("conv_soft_threshold", dict(y=y, weight=weight, theta=theta, bias=bias), options, dtype)
    check("conv_soft_threshold", dict(y=y, weight=weight, theta=theta[0]), options | dict(one_sided=True), dtype)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_lista_matches_reference(case, capability):
    """In float64, where a difference is a defect; in half precision two correct runs differ in their support."""
    y, dictionary, x, options = case.signal(), case.weight(), case.code(0.2), case.geometry
    theta = torch.rand(3, case.atoms, dtype=torch.float64) / 5
    tied, untied = dictionary / 2, case.weight(3) / 2
    for dtype in (torch.float64, torch.float32):
        check("lista_step", dict(x=x, y=y, dictionary=dictionary, analysis=tied, theta=theta[0]), options, dtype)
    arguments = dict(y=y, dictionary=dictionary, analysis=untied, theta=theta)
    check("lista", arguments, options, torch.float64)
    check("lista", arguments | dict(x0=x), options | dict(one_sided=True), torch.float64)
    check("lista", arguments | dict(x0=x, theta=theta[:, :1]), options | dict(momentum=[9.0, 0.7, -0.4]), torch.float64)
    check("lista", arguments | dict(analysis=tied), options | dict(momentum=[0.5, 0.7, 0.4]), torch.float64)
    check("lista", arguments | dict(theta=theta[0], analysis=tied), options | dict(iterations=1), torch.float64)
    arguments = dict(y=y, dictionary=dictionary, lam=theta[0, 0])
    check("ista", arguments | dict(x0=x), options | dict(iterations=4, fast=True), torch.float64)
    check("ista", arguments, options | dict(iterations=2, step=0.1), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CONVOLUTIONS[:4] + CONVOLUTIONS[12:14], ids=str)
def test_lista_in_low_precision(case, dtype, capability):
    """Values near the threshold may fall on either side of it, so the bound is on the mean error."""
    y, dictionary, untied = case.signal(), case.weight(), case.weight(3) / 4
    theta = torch.rand(3, case.atoms, dtype=torch.float64) / 5
    arguments = dict(y=y, dictionary=dictionary, analysis=untied, theta=theta)
    grad, truth, eager = numerics.expected(reference.lista, arguments, case.geometry, dtype)
    ours = numerics.evaluate(functional.lista, arguments, case.geometry, dtype, grad)
    for value, baseline, exact in zip(ours, eager, truth, strict=True):
        allowed = 2 * (baseline.double() - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm()
        assert (value.double() - exact).norm() <= allowed


def test_random_convolutions_match_reference(capability):
    generator = torch.Generator().manual_seed(1)
    for trial in range(40):
        case = numerics.random_convolution(generator)
        density = (0.0, 0.1, 1.0)[trial % 3]
        y, weight, x, options = case.signal(), case.weight(), case.code(density), case.geometry
        theta = torch.rand(case.atoms, dtype=torch.float64) / 4
        check("analysis", dict(y=y, weight=weight), options, torch.float64)
        check("synthesis", dict(x=x, weight=weight), options | dict(signal_size=case.size), torch.float64)
        arguments = dict(x=x, y=y, dictionary=weight, analysis=weight / 3, theta=theta)
        check("lista_step", arguments, options, torch.float64)


@pytest.mark.parametrize("case", CONVOLUTIONS[:8] + CONVOLUTIONS[12:], ids=str)
def test_gradcheck(case):
    """Against differences in float64; thresholds that no pre-activation comes near keep away from the kinks."""
    case = Convolution(**(vars(case) | dict(batch=1, atoms=case.groups * 2)))
    if case.size[-1] > 100:
        case.size = (40,)
        case.kernel, case.padding = (9,), 4
    options = case.geometry
    y, weight, x = (t.requires_grad_() for t in (case.signal(), case.weight(), case.code(0.5)))

    def gradcheck(function, *tensors):
        assert torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-5, fast_mode=True)

    def away(u: torch.Tensor) -> torch.Tensor:
        """A threshold for each atom in the widest gap between |u|."""
        values = u.detach().abs().transpose(0, 1).flatten(1).sort(dim=1).values
        values = torch.nn.functional.pad(values, (1, 0))
        gap = values.diff(dim=1)
        widest = gap.argmax(dim=1, keepdim=True)
        return (values.gather(1, widest) + gap.gather(1, widest) / 2).squeeze(1).requires_grad_()

    gradcheck(lambda y, w: functional.analysis(y, w, **options), y, weight)
    gradcheck(lambda x, w: functional.synthesis(x, w, case.size, **options), x, weight)
    u = reference.analysis(y, weight, **options)
    gradcheck(lambda u, t: functional.soft_threshold(u, t), u.detach().requires_grad_(), away(u))
    gradcheck(lambda u, t: functional.shrink(u, t, activation="mish"), u.detach().requires_grad_(), away(u))
    gradcheck(lambda y, w, t: functional.conv_soft_threshold(y, w, t, **options), y, weight, away(u))
    bias = torch.zeros(case.atoms, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda y, w, t, b: functional.conv_soft_threshold(y, w, t, b, **options), y, weight, away(u), bias)
    step = x + reference.analysis(y - reference.synthesis(x, weight, case.size, **options), weight, **options)
    gradcheck(
        lambda x, y, d, w, t: functional.lista_step(x, y, d, w, t, **options),
        x,
        y,
        weight,
        weight.detach().clone().requires_grad_(),
        away(step),
    )
    # Every value passes these thresholds, in every iteration.
    low = torch.full((2, case.atoms), -5.0, dtype=torch.float64, requires_grad=True)
    one_each = (case.weight(2) / 3).requires_grad_()
    gradcheck(lambda y, d, w, t: functional.lista(y, d, w, t, one_sided=True, **options), y, weight, one_each, low)
    gradcheck(
        lambda y, d, w, t, x: functional.lista(y, d, w, t, x0=x, momentum=[0, 0.6], one_sided=True, **options),
        y,
        weight,
        one_each,
        low,
        x,
    )
    gradcheck(lambda x: functional.l1_penalty(x), (x.detach() + 10).requires_grad_())


@pytest.mark.supports(
    "compile and transform", "second derivatives: of `analysis`, `synthesis`, `l1_penalty`; elsewhere refused by name"
)
def test_second_derivatives():
    case = CONVOLUTIONS[3]
    y, weight = case.signal().requires_grad_(), case.weight().requires_grad_()
    x = case.code(0.5).requires_grad_()
    gradgradcheck = torch.autograd.gradgradcheck
    assert gradgradcheck(lambda y, w: functional.analysis(y, w, **case.geometry), (y, weight), fast_mode=True)
    assert gradgradcheck(
        lambda x, w: functional.synthesis(x, w, case.size, **case.geometry), (x, weight), fast_mode=True
    )
    features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: functional.l1_penalty(x) ** 2, (features,), fast_mode=True)


@pytest.mark.supports(
    "compile and transform", "second derivatives: of `analysis`, `synthesis`, `l1_penalty`; elsewhere refused by name"
)
@pytest.mark.parametrize("name", ["soft_threshold", "shrink", "conv_soft_threshold", "lista"])
def test_unsupported_second_derivatives_are_refused_by_name(name):
    y = torch.randn(1, 1, 8, requires_grad=True)
    weight = torch.randn(2, 1, 3)
    call = {
        "soft_threshold": lambda: functional.soft_threshold(y, 0.1),
        "shrink": lambda: functional.shrink(y, 0.1, activation="silu"),
        "conv_soft_threshold": lambda: functional.conv_soft_threshold(y, weight, 0.1),
        "lista": lambda: functional.lista(y, weight, weight, 0.1, iterations=2),
    }[name]
    (grad,) = torch.autograd.grad(call().square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=f"second derivative of {name} is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_l1_penalty_matches_reference(dtype, capability):
    features = [torch.randn(3, 4, 5, 6), torch.randn(3, 70001) * (torch.rand(3, 70001) < 0.1), torch.randn(3)]
    features = [x.to(dtype).requires_grad_() for x in features]
    weights = torch.rand(3, requires_grad=True)
    for w in (None, weights, [0.1, 2.0, 3.0]):
        ours, twin = (m.l1_penalty(features, w) for m in (functional, reference))
        torch.testing.assert_close(ours, twin)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        leaves = features + ([weights] if w is weights else [])
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(twin, leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_l1_norm_of_many_small_values_is_exact(capability):
    """Where a running float32 sum loses them: 2^25 times 2^-13."""
    x = torch.full((1, 1 << 25), 2.0**-13)
    assert functional.l1_penalty(x, [1.0]).item() == 2.0**12


@pytest.mark.parametrize("shape", [(2, 3, 50, 50), (0, 3), (1,), ()])
def test_density_counts(shape, capability):
    x = torch.randn(shape)
    for alpha in (0.0, 0.5, 10.0):
        expected = (x.abs() > alpha).float().mean() if x.numel() else torch.tensor(0.0)
        torch.testing.assert_close(functional.density(x, alpha), expected)
        torch.testing.assert_close(functional.density(x, alpha), reference.density(x, alpha))
    assert not functional.density(x.requires_grad_()).requires_grad


def test_hard_threshold():
    u = torch.tensor([1e-7, -1e-7, 0.5, -2.0], requires_grad=True)
    x = functional.hard_threshold(u)
    assert x.tolist() == [0, 0, 0.5, -2.0]
    assert torch.autograd.grad(x.sum(), u)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dims", [1, 2])
def test_empty_batches(dims):
    size, kernel = (9,) * dims, (3,) * dims
    y = torch.zeros(0, 2, *size, requires_grad=True)
    weight = torch.randn(4, 2, *kernel, requires_grad=True)
    theta = torch.rand(4, requires_grad=True)
    codes = functional.conv_soft_threshold(y, weight, theta, theta, padding=1)
    step = functional.lista_step(codes, y, weight, weight, theta, padding=1)
    iterated = functional.lista(y, weight, weight, theta, iterations=3, momentum="fista", padding=1)
    for x in (codes, step, iterated):
        assert x.shape == (0, 4, *size)
        assert functional.synthesis(x, weight, size, padding=1).shape == y.shape
        assert functional.lasso_objective(x, y, weight, 0.1, padding=1).shape == (0,)
        gradients = torch.autograd.grad(x.sum() + functional.l1_penalty(x), (y, weight, theta), retain_graph=True)
        assert all(g.abs().sum() == 0 for g in gradients)


@pytest.mark.supports("numbers", "NaN and infinity as in eager")
def test_nan_and_infinity_pass_through(capability):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 0.0, -0.0])
    u = special.repeat(10)  # longer than a vector
    for theta in (0.0, 0.5, float("inf"), float("nan")):
        for one_sided in (False, True):
            ours, eager = (m.soft_threshold(u, theta, one_sided=one_sided) for m in (functional, reference))
            torch.testing.assert_close(ours, eager, equal_nan=True)
    for activation in reference.ACTIVATIONS:
        ours, eager = (m.shrink(u, 0.5, activation=activation) for m in (functional, reference))
        torch.testing.assert_close(ours, eager, equal_nan=True)
    y = torch.randn(1, 1, 9, 9)
    y[0, 0, 4, 4] = float("nan")
    weight = torch.randn(3, 1, 3, 3)
    ours, eager = (m.conv_soft_threshold(y, weight, 0.5, padding=1) for m in (functional, reference))
    torch.testing.assert_close(ours, eager, equal_nan=True)
    assert functional.synthesis(ours, weight, (9, 9), padding=1).isnan().any()


def test_gradient_at_the_kink_is_zero(capability):
    u = torch.tensor([1.0, -1.0], requires_grad=True)
    theta = torch.tensor(1.0, requires_grad=True)
    functional.soft_threshold(u, theta).sum().backward()
    assert u.grad.tolist() == [0, 0] and theta.grad == 0


@pytest.mark.supports("memory", "any subset of parameters and input may require a gradient")
def test_only_the_gradients_asked_for(capability):
    case = CONVOLUTIONS[1]
    tensors = dict(
        y=case.signal(),
        dictionary=case.weight(),
        analysis=case.weight(2) / 2,
        theta=torch.rand(2, 64).double(),
        x0=case.code(0.2),
    )
    expected = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    reference.lista(**expected, **case.geometry).square().sum().backward()
    for name in tensors:
        arguments = {k: v.clone().requires_grad_(k == name) for k, v in tensors.items()}
        functional.lista(**arguments, **case.geometry).square().sum().backward()
        torch.testing.assert_close(arguments[name].grad, expected[name].grad)


@pytest.mark.supports("numbers", "the same bits for any number of threads")
def test_the_same_bits_for_any_number_of_threads():
    case = Convolution(3, 2, 20, (40, 33), (5, 5), padding=2)
    y, weight = case.signal().float().requires_grad_(), case.weight().float().requires_grad_()
    theta = torch.rand(4, 20).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = functional.lista(y, weight, weight / 9, theta, momentum="fista", padding=2)
            results.append([x, *torch.autograd.grad(x.square().sum() + functional.l1_penalty(x), (y, weight, theta))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- the passes of the MSD-CSC block ----------------------------------------------------------------------------------

FLOAT64 = torch.float64
LAYOUTS = ("dense", "slice", "last")
PASSES = [
    (3, 5, 6, 7),
    (1, 2, 5, 6),
    (1, 1, 1, 1),
    (2, 17, 1, 40),
    (2, 3, 33, 1),
    (0, 3, 4, 5),
    (2, 0, 4, 5),
    (2, 3, 0, 5),
]


def planes(shape, dtype: torch.dtype, layout: str) -> Tensor:
    """Random, as a tensor of its own, as a slice of channels, or channel by channel."""
    if layout == "slice":
        return torch.randn(shape[0], shape[1] + 3, *shape[2:]).to(dtype)[:, 2 : 2 + shape[1]]
    x = torch.randn(shape).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "last" else x


def dilated(module, x, z, weight, base, dilation, dtype) -> list[Tensor]:
    """F x, base + F^T z into the base, and the gradient of F."""
    x, z, weight, base = (t.to(dtype) for t in (x, z, weight, base))
    features, sums = torch.empty_like(z, memory_format=torch.contiguous_format), base.clone()
    module.dilated_convolution_(features, x, weight, dilation, False, None)
    module.dilated_convolution_(sums, z, weight, dilation, True, sums)
    return [features, sums, module.dilated_correlation(x, z, dilation)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dilation", [1, 2, 5, 40])
@pytest.mark.parametrize("shape", [*PASSES, (2, 33, 16, 16), (17, 9, 8, 8), (1, 10, 70, 41)])
def test_passes_of_dilated_convolutions(shape, dilation, dtype, capability):
    width = 13 if shape[1] == 9 else 34 if shape[1] == 17 else 3
    codes = (shape[0], width, *shape[2:])
    for layout in LAYOUTS:
        x, z = planes(shape, dtype, layout), planes(codes, dtype, layout)
        weight, base = torch.randn(width, shape[1], 3, 3).to(dtype), torch.randn(shape).to(dtype)
        call = (x, z, weight, base, dilation)
        ours, truth = dilated(ops, *call, dtype), dilated(_composed, *call, FLOAT64)
        wide = FLOAT64 if dtype == FLOAT64 else torch.float32
        eager = dilated(_composed, *call, dtype)[:2] + dilated(_composed, *call, wide)[2:]
        assert_as_exact_as_eager(ours, eager, truth, ["F x", "F^T z", "F"])
        if x.numel():
            leaves = [t.double().requires_grad_() for t in (x, weight)]
            features = F.conv2d(*leaves, None, 1, dilation, dilation)
            grads = torch.autograd.grad(features, leaves, z.double())
            torch.testing.assert_close(truth, [features.detach(), base.double() + grads[0], grads[1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_of_dilated_convolutions_between_channels_of_one_buffer(dtype):
    """Written in place, beside what is read; nothing else changes."""
    buffer = torch.randn(3, 19, 9, 8).to(dtype)
    before, weight = buffer.double().clone(), torch.randn(7, 11, 3, 3).to(dtype)
    x, z = before[:, 1:12], before[:, 12:]
    ops.dilated_convolution_(buffer[:, 12:], buffer[:, 1:12], weight, 2, False, None)
    torch.testing.assert_close(buffer[:, 12:], F.conv2d(x, weight.double(), None, 1, 2, 2).to(dtype))
    buffer.copy_(before)
    ops.dilated_convolution_(buffer[:, 1:12], buffer[:, 12:], weight, 2, True, buffer[:, 1:12])
    expected = x + F.conv_transpose2d(z, weight.double(), None, 1, 2, 0, 1, 2)
    torch.testing.assert_close(buffer[:, 1:12], expected.to(dtype))
    assert torch.equal(buffer[:, 0], before[:, 0].to(dtype)) and torch.equal(buffer[:, 12:], z.to(dtype))


@pytest.mark.parametrize("shape", [(3, 5, 70, 41), (33, 6, 8, 8), (1, 70, 16, 16)])
def test_passes_have_the_same_bits_for_any_number_of_threads(shape):
    x, z = torch.randn(shape), torch.randn(shape[0], 40, *shape[2:])
    weight, share = torch.randn(40, shape[1], 3, 3), torch.empty(shape)
    statistics, threads, results = torch.rand(5, shape[1]).unbind(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grad = x.flip(0)
            sums = ops.norm_relu_backward_(grad, x, *statistics, True, torch.tensor(0.3), 2, None, share, True)
            results.append([*dilated(ops, x, z, weight, x, 2, torch.float32), grad, share.clone(), *sums])
            results[-1] += norm_relu(ops, x, [torch.tensor(0.7), *statistics[:3]], statistics[3:], True, *[x.dtype] * 2)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return _composed.moments(x.double())


def norm_relu(module, x, values, statistics, training, dtype, kept) -> list[Tensor]:
    """Of a copy of x, and the statistics."""
    x, values, statistics = x.to(dtype).clone(), [v.to(kept) for v in values], [s.to(kept).clone() for s in statistics]
    module.norm_relu_(x, *values, *statistics, training, 1.0)
    return [x, *statistics]


def unfold(module, u, g, e, values, statistics, training, error, dtype, kept) -> list[Tensor]:
    u, g = (t.to(dtype).contiguous().clone() for t in (u, g))
    values, statistics = [v.to(kept) for v in values], [s.to(kept).clone() for s in statistics]
    out = g if error else torch.empty_like(u)  # in the place of g, or not
    module.unfold_norm_relu_(u, g, e.to(dtype), *values, *statistics, training, 1.0, out, error)
    return [u, out, *statistics]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PASSES)
def test_passes_of_norm_and_relu(shape, dtype, training, capability):
    wide = FLOAT64 if dtype == FLOAT64 else torch.float32
    x = torch.randn(shape[0], shape[1] + 3, *shape[2:]).to(dtype)[:, 2 : 2 + shape[1]]
    values = [torch.tensor(0.7), *torch.randn(3, shape[1]).unbind()]
    statistics = [torch.randn(shape[1]), torch.rand(shape[1])]
    names = ["result", "mean", "variance"]
    call = (x, values, statistics, training)
    ours, truth = norm_relu(ops, *call, dtype, wide), norm_relu(_composed, *call, *(FLOAT64,) * 2)
    eager = norm_relu(_composed, *call, dtype, wide)[:1] + norm_relu(_composed, *call, wide, wide)[1:]
    assert_as_exact_as_eager(ours, eager, truth, names)
    if x.numel() > shape[1]:
        scale, bias, gamma, beta = (v.double() for v in values)
        u = scale * x.double() + bias.view(1, -1, 1, 1)
        given = (None, None) if training else [s.double() for s in statistics]
        torch.testing.assert_close(truth[0], torch.relu(F.batch_norm(u, *given, gamma, beta, training, 0.1, 1.0)))
        if training:
            torch.testing.assert_close(truth[1:], list(moments_of(u)))
    for layout, error in itertools.product(LAYOUTS, (False, True)):
        e, g = planes((shape[0], shape[1] // 2, *shape[2:]), dtype, layout), planes(shape, dtype, layout)
        call = (x, g, e, values, statistics, training, error)
        ours, truth = unfold(ops, *call, dtype, wide), unfold(_composed, *call, *(FLOAT64,) * 2)
        assert_as_exact_as_eager(ours[:1], unfold(_composed, *call, dtype, wide)[:1], truth[:1], ["u"])
        u = g.double() - values[0].double() * torch.cat([e, x[:, e.shape[1] :]], 1).double()
        call = ([torch.ones(()), *values[1:]], statistics, training)
        expected = norm_relu(_composed, u, *call, FLOAT64, FLOAT64)
        torch.testing.assert_close(truth, [u, g.double() - expected[0] if error else expected[0], *expected[1:]])
        # All else is that of u as it stands there.
        in_place = norm_relu(ops, ours[0], *call, dtype, wide)
        difference = (g.double() - in_place[0].double()).to(dtype) if error else in_place[0]
        rounding = 4 * torch.finfo(dtype).eps * max(t.abs().max().item() if t.numel() else 0 for t in (ours[1], g))
        torch.testing.assert_close(ours[1], difference, rtol=0, atol=rounding)
        torch.testing.assert_close(ours[2:], in_place[1:])


def norm_relu_backward(module, tensors, values, training, handed, e, share, error, dtype, kept) -> list[Tensor]:
    (grad, x), values = [t.to(dtype) for t in tensors], [t.to(kept) for t in values]
    grad = grad.contiguous().clone()
    share = torch.zeros_like(grad) if share else None
    e = None if e is None else e.to(dtype)
    factor = torch.tensor(0.3, dtype=kept)
    sums = module.norm_relu_backward_(grad, x, *values, training, factor, handed, e, share, error)
    return [grad, *([] if share is None else [share]), *sums]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PASSES)
def test_passes_of_norm_and_relu_have_the_gradient_of_autograd(shape, dtype, training, capability):
    wide = FLOAT64 if dtype == FLOAT64 else torch.float32
    for layout, with_e, share, error in itertools.product(LAYOUTS, (False, True), (False, True), (False, True)):
        u, grad = planes(shape, dtype, layout), planes(shape, dtype, layout)
        handed = shape[1] // 2
        e = planes((shape[0], handed, *shape[2:]), dtype, layout) if with_e else None
        gamma, beta = (torch.randn(shape[1]).to(dtype) for _ in range(2))
        mean, variance = _composed.moments(u.double()) if training else (torch.randn(shape[1]), torch.rand(shape[1]))
        inverse = (variance.double() + 1e-2).rsqrt()
        statistics = (inverse, -mean.double() * inverse, gamma, beta, inverse)

        call = ((grad, u), statistics, training, handed, e, share, error)
        ours, truth = norm_relu_backward(ops, *call, dtype, wide), norm_relu_backward(_composed, *call, *(FLOAT64,) * 2)
        eager = norm_relu_backward(_composed, *call, dtype, wide)
        exact = norm_relu_backward(_composed, *call, wide, wide)
        names = ["grad", *["share"] * share, "gamma", "beta"]
        eager = eager[: 1 + share] + exact[1 + share :]
        assert_as_exact_as_eager(ours[:-1], eager[:-1], truth[:-1], names)
        # In training what the dot adds up cancels.
        terms = (truth[0][:, : e.shape[1]] / 0.3 * e.double() if with_e else truth[0] / 0.3 * u.double()).abs().sum()
        rounding = 4 * torch.finfo(wide).eps * terms
        deviations = [(dot - truth[-1]).abs().sum() for dot in (ours[-1], exact[-1])]
        assert deviations[0] <= 2 * deviations[1] + rounding
        if u.numel() > shape[1]:  # of one value batch norm has no deviation
            leaves = [t.double().requires_grad_() for t in (u, gamma, beta)]
            given = (None, None) if training else (mean.double(), variance.double())
            result = torch.relu(F.batch_norm(leaves[0], *given, *leaves[1:], training, 0.1, 1e-2))
            grad_u, *of_norm = torch.autograd.grad(result, leaves, grad.double())
            factors = torch.ones(shape[1], dtype=FLOAT64).index_fill_(0, torch.arange(handed), 0.3).view(1, -1, 1, 1)
            if share:
                torch.testing.assert_close(truth[1], grad_u - grad.double() if error else grad_u)
            torch.testing.assert_close([truth[0], *truth[1 + share : 3 + share]], [grad_u * factors, *of_norm])
            other = u.double() if e is None else torch.cat([e.double(), torch.zeros_like(grad_u[:, handed:])], 1)
            torch.testing.assert_close(truth[-1], (grad_u * other).sum((0, 2, 3)))
