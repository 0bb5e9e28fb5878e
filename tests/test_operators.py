"""The operators as PyTorch sees them (schema, fake kernels, autograd, torch.compile, autocast), and the composition
that runs on CUDA, which runs on any device."""

from __future__ import annotations

import numerics
import pytest
import torch
from numerics import CONVOLUTIONS, Convolution
from torch.library import opcheck

from dsc_ops import _composed, functional

ops = torch.ops.dsc_ops
CASES = [Convolution(2, 4, 6, (9, 8), (3, 2), (2, 1), (1, 0), (1, 2), 2), Convolution(2, 1, 5, (13,), (3,), padding=1)]


def trailing(case: Convolution) -> list:
    """Geometry as the operators take it."""
    dims = len(case.size)
    expand = [list(v) if isinstance(v, tuple) else [v] * dims for v in (case.stride, case.padding, case.dilation)]
    return [*expand, case.groups]


def res_csc(training: bool, shortcut: bool) -> tuple:
    tensors = [torch.randn(shape) for shape in ((2, 16, 3, 4), (16, 16, 3, 3), (16, 16, 3, 3), ())]
    tensors += [torch.rand(16) + 0.5 for _ in range(8)]
    return *(t.requires_grad_(i < 8) for i, t in enumerate(tensors)), training, 1e-5, 0.1, shortcut


def res_csc_backward(training: bool) -> tuple:
    tensors = [a.detach() if isinstance(a, torch.Tensor) else a for a in res_csc(training, True)]
    codes, *tape = ops.res_csc(*tensors)
    return torch.randn_like(codes), *tape, *tensors[:8], *tensors[12:]


def samples(case: Convolution) -> dict[str, list[tuple]]:
    """Arguments of every operator; the first list of each is differentiated."""
    y, weight, x = (t.float().requires_grad_() for t in (case.signal(), case.weight(), case.code(0.3)))
    theta, scalar = torch.rand(case.atoms, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    bias, rest = torch.randn(case.atoms, requires_grad=True), trailing(case)
    thetas, one_each = torch.rand(3, case.atoms, requires_grad=True), case.weight(3).float().requires_grad_()
    tied, grad = case.weight(1).float().requires_grad_(), torch.randn_like(x)
    one_theta, momentum = torch.rand(1, case.atoms, requires_grad=True), [0.0, 0.3, 0.5]
    tape = ops.lista(y, weight, one_each, thetas, x, momentum, *rest, False, True)[1].detach()
    last = x.detach().to(memory_format=torch.channels_last) if x.dim() == 4 else x.detach()
    planes = torch.randn(2, 9, 5, 6)[:, :4]
    values = [torch.rand(4) for _ in range(5)]
    return {
        "soft_threshold": [(x, theta, bias, grad, False), (last.clone().requires_grad_(), scalar, None, None, True)],
        "soft_threshold_backward": [(grad, x.detach(), theta.detach(), False), (grad, last, scalar.detach(), True)],
        "shrink": [(x, theta, "mish", False), (last, scalar, "elu", True)],
        "shrink_backward": [
            (grad, x.detach(), theta.detach(), "gelu", False),
            (grad, last, scalar.detach(), "relu", True),
        ],
        "l1_norm": [(x, 1e-6), (last, 0.0)],
        "l1_norm_backward": [(torch.tensor(2.0, requires_grad=True), x.detach()), (torch.tensor(1.0), last.detach())],
        "use_large_pages": [(torch.randn(3),)],
        "dilated_convolution_": [
            (torch.randn(2, 6, 5, 6), planes, torch.randn(6, 4, 3, 3), 2, False, None),
            (torch.randn(2, 4, 5, 6), torch.randn(2, 6, 5, 6), torch.randn(6, 4, 3, 3), 1, True, planes),
        ],
        "dilated_correlation": [(planes, torch.randn(2, 6, 5, 6), 2)],
        "norm_relu_": [(torch.randn(2, 4, 5, 6), torch.rand(()), *values, True, 1e-5)],
        "unfold_norm_relu_": [
            (torch.randn(2, 4, 5, 6), planes, planes[:, 1:], torch.rand(()), *values, training, 1e-5)
            + (torch.randn(2, 4, 5, 6), error)
            for training, error in ((True, False), (False, True))
        ],
        "norm_relu_backward_": [
            (torch.randn(2, 4, 5, 6), planes, *values, training, torch.rand(()), 2, e, share, True)
            for training, e, share in ((True, planes[:, 1:3], torch.randn(2, 4, 5, 6)), (False, None, None))
        ],
        "res_csc": [res_csc(True, False), res_csc(False, True)],
        "res_csc_backward": [res_csc_backward(True), res_csc_backward(False)],
        "analysis": [(y, weight, *rest)],
        "synthesis": [(x, weight, list(case.size), *rest)],
        "correlation": [(y, x, list(case.kernel), *rest)],
        "conv_soft_threshold": [(y, weight, bias, theta, *rest, False), (y, weight, None, scalar, *rest, True)],
        "conv_soft_threshold_backward": [
            (grad, x.detach(), y.detach(), weight.detach(), theta.detach(), *rest, False, needs)
            for needs in ([True] * 4, [True, False, False, True])
        ],
        "lista": [
            (y, weight, one_each, thetas, x, momentum, *rest, False, True),
            (y, weight, tied, thetas, None, [], *rest, True, True),
            (y, weight, tied, one_theta, None, [], *rest, True, True),
            (y.detach(), weight.detach(), tied.detach(), thetas.detach(), None, [], *rest, False, False),
        ],
        "lista_backward": [
            (
                grad,
                tape,
                y.detach(),
                weight.detach(),
                one_each.detach(),
                thetas.detach(),
                x.detach(),
                momentum,
                *rest,
            )
            + (False, needs)
            for needs in ([True] * 5, [False, True, False, True, False])
        ],
    }


def all_operators() -> set[str]:
    """Without packed_*, which are nothing by themselves: what lista and conv_soft_threshold do on CUDA; and without
    msd_csc, written in PyTorch and checked with its layer (test_csc.py)."""
    names = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("dsc_ops::")}
    return {name for name in names if not name.startswith(("packed_", "msd_csc"))}


def test_every_operator_is_checked_here():
    assert all_operators() == set(samples(CASES[0]))


@pytest.mark.supports("compile and transform", "`torch.library.opcheck` of every operator")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", sorted(samples(CASES[0])))
def test_opcheck(name, case):
    for arguments in samples(case)[name]:
        results = opcheck(getattr(ops, name).default, arguments)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (0,), ()])
def test_opcheck_of_empty_and_0d_tensors(shape):
    u, theta = torch.randn(shape, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    opcheck(ops.soft_threshold.default, (u, theta, None, None, False))
    opcheck(ops.shrink.default, (u, theta, "silu", False))
    assert set(opcheck(ops.l1_norm.default, (u, 0.0)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_composition_for_cuda_equals_the_kernels(case):
    """What runs on CUDA in place of fused kernels, run here."""
    case = Convolution(
        **(vars(case) | (dict(padding=tuple(k // 2 for k in case.kernel)) if case.padding == "same" else {}))
    )
    y, weight, x, rest = case.signal(), case.weight(), case.code(0.4), trailing(case)
    theta, bias, grad = torch.rand(case.atoms).double(), torch.randn(case.atoms).double(), torch.randn_like(x)
    thetas, one_each, tied = torch.rand(3, case.atoms).double() / 4, case.weight(3) / 2, case.weight(1) / 2

    def compare(name: str, *arguments):
        ours, composed = getattr(ops, name)(*arguments), getattr(_composed, name)(*arguments)
        torch.testing.assert_close(composed, ours)
        return ours

    compare("analysis", y, weight, *rest)
    compare("synthesis", x, weight, list(case.size), *rest)
    compare("correlation", y, x, list(case.kernel), *rest)
    codes = compare("conv_soft_threshold", y, weight, bias, theta, *rest, False)
    for needs in ([True] * 4, [False, True, True, False]):
        compare("conv_soft_threshold_backward", grad, codes, y, weight, theta, *rest, False, needs)
    for start, analysis, momentum in ((x, one_each, []), (None, tied, [0.0, 0.4, 0.7]), (x, tied, [0.0, 0.4, -0.3])):
        arguments = (y, weight, analysis, thetas, start, momentum, *rest)
        (codes, tape), (composed, composed_tape) = (m.lista(*arguments, False, True) for m in (ops, _composed))
        torch.testing.assert_close(composed, codes)
        torch.testing.assert_close(*(m.lista(*arguments, True, False)[0] for m in (ops, _composed)))
        for needs in ([True] * 4 + [start is not None], [False, True, False, True, False]):
            ours = ops.lista_backward(grad, tape, *arguments, False, needs)
            torch.testing.assert_close(_composed.lista_backward(grad, composed_tape, *arguments, False, needs), ours)


def network(case: Convolution, theta: torch.Tensor, weight: torch.Tensor):
    """A function through every public function that has a gradient."""

    def run(y: torch.Tensor) -> torch.Tensor:
        options = case.geometry
        x = functional.conv_soft_threshold(y, weight, theta, theta, **options)
        x = functional.lista_step(x, y, weight, weight / 4, theta, **options)
        x = functional.lista(y, weight, weight / 4, theta, iterations=3, x0=x, momentum="fista", **options)
        x = functional.ista(y, weight, 0.1, iterations=2, x0=x, fast=True, **options)
        x = functional.shrink(functional.soft_threshold(x, 0.01), theta, activation="silu")
        x = functional.hard_threshold(x) * functional.density(x)
        signal = functional.synthesis(x, weight, y.shape[2:], **options)
        x = x + functional.analysis(signal, weight, **options)
        objective = functional.lasso_objective(x, y, weight, 0.1, **options).sum()
        return objective + functional.l1_penalty([x, signal]) + functional.lipschitz(weight, y.shape[2:], **options)

    return run


@pytest.mark.supports(
    "compile and transform", "`torch.compile(fullgraph=True)` of every function, forward and backward"
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compile_fullgraph(case):
    y, weight = case.signal().float().requires_grad_(), case.weight().float().requires_grad_()
    theta = torch.rand(case.atoms).mul(0.1).requires_grad_()
    run = network(case, theta, weight)
    # AOTAutograd traces everything that inductor would, without compiling C++.
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        loss = function(y)
        results.append([loss, *torch.autograd.grad(loss, (y, weight, theta))])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_compile_with_dynamic_sizes():
    layer = torch.compile(
        lambda y: functional.lista(y, weight, weight / 9, theta, iterations=2, stride=2, padding=1),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    weight, theta = torch.randn(5, 2, 3, 3, requires_grad=True), torch.rand(5)
    with torch.compiler.set_stance("eager_on_recompile"):
        for batch, height, width in ((2, 8, 9), (3, 13, 10), (5, 31, 6)):
            y = torch.randn(batch, 2, height, width)
            expected = functional.lista(y, weight, weight / 9, theta, iterations=2, stride=2, padding=1)
            torch.testing.assert_close(layer(y), expected)
            torch.autograd.grad(layer(y).sum(), weight)


@pytest.mark.supports(
    "precision", "autocast on CPU: in and out the dtypes of `nn.Conv2d`, whatever inputs and parameters have"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_convolutions(dtype):
    y, weight, theta = (
        torch.randn(2, 3, 8, 8),
        torch.randn(4, 3, 3, 3, requires_grad=True),
        torch.rand(4, requires_grad=True),
    )
    calls = [
        lambda y, w, t: functional.analysis(y, w),
        lambda y, w, t: functional.synthesis(functional.analysis(y, w), w, (8, 8)),
        lambda y, w, t: functional.conv_soft_threshold(y, w, t, t),
        lambda y, w, t: functional.lista(y, w, w / 9, t, iterations=2),
        lambda y, w, t: functional.ista(y, w, 0.1, iterations=2),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype):
            result = call(y, weight, theta)
        assert result.dtype == dtype
        plain = call(y.to(dtype), weight.to(dtype), theta.to(dtype))
        assert numerics.error(result, plain) <= 0.05 * plain.abs().max()
        (grad,) = torch.autograd.grad(result.float().square().sum(), weight)
        assert grad.dtype == torch.float32 and grad.abs().sum() > 0
    with torch.autocast("cpu", dtype):
        assert functional.analysis(y.double(), weight.double()).dtype == torch.float64
        # Mixed inputs, as convolutions leave them.
        assert functional.conv_soft_threshold(y.to(dtype), weight, theta).dtype == dtype
        assert functional.soft_threshold(y.to(dtype), theta[:3]).dtype == dtype
        assert functional.l1_penalty(y.to(dtype)).dtype == torch.float32


@pytest.mark.supports("memory", "inference takes no more memory for more iterations")
def test_no_tape_is_kept_for_inference():
    case = CASES[0]
    y, weight = case.signal().float(), case.weight(1).float()
    arguments = (y, weight[0], weight, torch.rand(3, case.atoms), None, [], *trailing(case), False)
    assert ops.lista(*arguments, False)[1].numel() == 0
    assert ops.lista(*arguments, True)[1].numel() > 0


def test_a_backward_pass_that_kept_no_tape_runs_the_iterations_again():
    case = CASES[1]
    y, weight = case.signal().requires_grad_(), case.weight(1)
    theta = torch.rand(3, case.atoms).double()
    gradients = [
        torch.autograd.grad(ops.lista(y, weight[0], weight, theta, None, [], *trailing(case), False, keep)[0].sum(), y)[
            0
        ]
        for keep in (True, False)
    ]
    torch.testing.assert_close(*gradients)
