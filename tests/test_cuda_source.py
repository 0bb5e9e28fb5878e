"""The source of the CUDA operators, executed on the CPU by cuda_sim/, against eager PyTorch; csrc/core/scalar.h.

Every call of an operator runs its blocks and threads in another order. The cases marked `every_mode` also run under the
sanitizers and the race checker (test_cuda_sim.py).

Needs g++ and torch's headers, not the dsc_ops package.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from cuda_sim_build import SIM

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RHO = {"relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "silu": F.silu, "mish": F.mish, "gelu": F.gelu}


# --- inputs and comparison --------------------------------------------------------------------------------------------


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a transposed tensor."""
    wide = torch.full((*x.shape[::-1], 2), 9.0, dtype=x.dtype)
    wide[..., 0] = x.permute(*reversed(range(x.dim())))
    return wide[..., 0].permute(*reversed(range(x.dim())))


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, but not where accesses of 16 bytes could begin."""
    return torch.cat([torch.full((1,), 9.0, dtype=x.dtype), x.reshape(-1)])[1:].view(x.shape)


LAYOUTS = [contiguous, channels_last, strided]

# The sizes divide neither 8 nor 32 nor 256. The large ones have several tasks a channel.
CASES = [
    ((2, 7), contiguous),
    ((600, 3), strided),
    ((3, 4, 301), contiguous),
    ((3, 4, 301), strided),
    ((3, 5, 7, 11), contiguous),
    ((3, 5, 7, 11), channels_last),
    ((3, 5, 7, 11), strided),
    ((2, 33, 5, 3), channels_last),
    ((2, 3, 2, 5, 3), contiguous),
    ((1, 1, 1, 1), channels_last),
    ((3, 5, 41, 37), contiguous),
    ((3, 5, 41, 37), channels_last),
    # Planes of whole vectors of 16 bytes, of every dtype.
    ((3, 4, 304), contiguous),
    ((3, 4, 304), shifted),
    ((2, 3, 56, 200), contiguous),
]
# Of these the sanitizers and the race checker see each kind of plan.
IN_EVERY_MODE = [
    ((600, 3), strided),
    ((3, 4, 301), contiguous),
    ((2, 33, 5, 3), channels_last),
    ((3, 4, 304), contiguous),
]
over_cases = pytest.mark.parametrize(
    "shape, layout",
    [pytest.param(*case, marks=pytest.mark.every_mode if case in IN_EVERY_MODE else ()) for case in CASES],
    ids=["x".join(map(str, shape)) + "-" + layout.__name__ for shape, layout in CASES],
)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_layout(out: torch.Tensor, u: torch.Tensor) -> None:
    assert out.shape == u.shape and out.dtype == u.dtype
    last = u.dim() == 4 and not u.is_contiguous() and u.is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def assert_close(out: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, scale: float = 1.0) -> None:
    """No further from the float64 result than twice eager's distance; scale: of what was added up."""
    assert out.shape == eager.shape and out.dtype == eager.dtype
    if out.numel() == 0:
        return
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    tolerance = 4 * torch.finfo(wide).eps * max(1.0, scale)
    error, allowed = (out.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= 2 * allowed + tolerance, (error, allowed, tolerance)


def over_channels(v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """theta or bias, to be added to u."""
    return v if v.dim() == 0 else v.view(-1, *[1] * (u.dim() - 2))


def channel_sum(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.sum() if like.dim() == 0 else x.sum([d for d in range(x.dim()) if d != 1])


def random_inputs(shape, dtype, per_channel):
    """u, theta, grad"""
    torch.manual_seed(0)
    theta = torch.rand(shape[1] if per_channel else ()) * 0.5 + 0.75
    return torch.randn(shape).to(dtype), theta.to(dtype), torch.randn(shape).to(dtype)


# --- soft threshold ---------------------------------------------------------------------------------------------------


def eager_soft(u, theta, bias, residual, one_sided):
    if bias is not None:
        u = u + over_channels(bias, u)
    if residual is not None:
        u = u + residual
    if one_sided:
        return F.relu(u - over_channels(theta, u))
    return u.sign() * F.relu(u.abs() - over_channels(theta, u))


def eager_soft_backward(grad, codes, theta):
    grad_u = grad.where(codes != 0, torch.zeros_like(grad))
    grad_bias = channel_sum(grad_u, codes[0]) if codes.dim() >= 2 else codes.new_empty(0)
    return grad_u, -channel_sum(codes.sign() * grad, theta), grad_bias


@over_dtypes
@over_cases
def test_soft_threshold(ops, shape, layout, dtype):
    for one_sided in (False, True):
        for per_channel in (False, True):
            for with_bias, with_residual in ((False, False), (True, False), (False, True), (True, True)):
                u, theta, residual = random_inputs(shape, dtype, per_channel)
                bias = torch.randn(shape[1]).to(dtype) if with_bias else None
                residual = residual if with_residual else None
                arguments = u, theta, bias, residual
                wide = [None if a is None else a.double() for a in arguments]
                out = ops.soft_threshold(layout(u), theta, bias, residual, one_sided)
                assert_layout(out, layout(u))
                assert_close(out, eager_soft(*arguments, one_sided), eager_soft(*wide, one_sided), 4)


@over_dtypes
@over_cases
def test_soft_threshold_backward(ops, shape, layout, dtype):
    for one_sided, per_channel in ((False, False), (True, True)):
        u, theta, grad = random_inputs(shape, dtype, per_channel)
        codes = eager_soft(u, theta, None, None, one_sided)
        out = ops.soft_threshold_backward(grad, layout(codes), theta, one_sided)
        assert_layout(out[0], layout(codes))
        eager = eager_soft_backward(grad, codes, theta)
        exact = eager_soft_backward(grad.double(), codes.double(), theta)
        assert torch.equal(out[0], eager[0])
        for index in (1, 2):
            assert_close(out[index], eager[index], exact[index], grad.double().abs().sum())


@pytest.mark.parametrize("threshold, density", [(9.0, 0.0), (1.64, 0.1), (0.0, 1.0)])
def test_soft_threshold_densities(ops, threshold, density):
    u, _, grad = random_inputs((3, 5, 41, 37), torch.float32, True)
    theta = torch.full((5,), threshold)
    codes = ops.soft_threshold(u, theta, None, None, False)
    assert (codes != 0).double().mean().item() == pytest.approx(density, abs=0.01)
    assert torch.equal(codes, eager_soft(u, theta, None, None, False))
    out = ops.soft_threshold_backward(grad, codes, theta, False)
    exact = eager_soft_backward(grad.double(), codes.double(), theta)
    for result, expected in zip(out, exact, strict=True):
        assert_close(result, expected.float(), expected, grad.double().abs().sum())


@pytest.mark.every_mode
def test_soft_threshold_without_channels(ops):
    for shape in ((), (17,), (4500,)):
        u, theta, grad = random_inputs(shape, torch.float32, False)
        codes = ops.soft_threshold(u, theta, None, None, False)
        assert torch.equal(codes, eager_soft(u, theta, None, None, False))
        grad_u, grad_theta, grad_bias = ops.soft_threshold_backward(grad, codes, theta, False)
        expected_u, expected_theta, _ = eager_soft_backward(grad, codes, theta)
        assert torch.equal(grad_u, expected_u) and grad_bias.shape == (0,)
        torch.testing.assert_close(grad_theta, expected_theta)


@pytest.mark.every_mode
def test_other_layouts_of_the_other_tensors(ops):
    """residual, grad, theta and bias in layouts that are not that of u."""
    u, theta, residual = random_inputs((3, 5, 7, 11), torch.float32, True)
    theta_column, bias_column = torch.stack([theta, -theta], 1)[:, 0], torch.stack([theta, -theta], 1)[:, 1]
    expected = eager_soft(u, theta, -theta, residual, False)
    for layout in LAYOUTS:
        for other in LAYOUTS:
            out = ops.soft_threshold(layout(u), theta_column, bias_column, other(residual), False)
            torch.testing.assert_close(out, expected)
            grad_u, _, _ = ops.soft_threshold_backward(other(residual), layout(expected), theta_column, False)
            assert torch.equal(grad_u, eager_soft_backward(residual, expected, theta)[0])


# --- generalised threshold --------------------------------------------------------------------------------------------


def eager_shrink(u, theta, activation, one_sided):
    rho, t = RHO[activation], over_channels(theta, u)
    return rho(u - t) if one_sided else rho(u - t) - rho(-u - t)


def eager_shrink_backward(grad, u, theta, activation, one_sided):
    u, theta = u.detach().requires_grad_(), theta.detach().requires_grad_()
    return torch.autograd.grad(eager_shrink(u, theta, activation, one_sided), (u, theta), grad)


@over_dtypes
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize(
    "activation", [pytest.param(name, marks=pytest.mark.every_mode if name == "mish" else ()) for name in RHO]
)
def test_shrink(ops, activation, one_sided, dtype):
    rest = (activation, one_sided)
    for shape, layout, per_channel in (
        ((2, 3, 8, 40), contiguous, True),
        ((3, 5, 41, 37), contiguous, False),
        ((3, 5, 41, 37), channels_last, True),
        ((3, 5, 7, 11), strided, True),
    ):
        u, theta, grad = random_inputs(shape, dtype, per_channel)
        out = ops.shrink(layout(u), theta, *rest)
        assert_layout(out, layout(u))
        exact = eager_shrink(u.double(), theta.double(), *rest)
        assert_close(out, eager_shrink(u, theta, *rest), exact, 4)

        grad_u, grad_theta = ops.shrink_backward(grad, layout(u), theta, *rest)
        assert_layout(grad_u, layout(u))
        eager = eager_shrink_backward(grad, u, theta, *rest)
        exact = eager_shrink_backward(grad.double(), u.double(), theta.double(), *rest)
        assert_close(grad_u, eager[0], exact[0], 4)
        assert_close(grad_theta, eager[1], exact[1], grad.double().abs().sum())


def test_shrink_refuses_other_activations(ops):
    with pytest.raises(RuntimeError, match="activation must be relu, leaky_relu, elu, silu, mish or gelu, not tanh"):
        ops.shrink(torch.zeros(3), torch.tensor(1.0), "tanh", False)


# --- l1 penalty -------------------------------------------------------------------------------------------------------


@over_dtypes
@over_cases
def test_l1_norm(ops, shape, layout, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for alpha in (0.0, 1e-6, 0.5):
        x, _, _ = random_inputs(shape, dtype, False)
        x = x * (torch.rand(shape) < 0.5)
        norm, count = ops.l1_norm(layout(x), alpha)
        assert_close(norm, x.abs().sum(dtype=wide), x.double().abs().sum(), x.double().abs().sum())
        assert count.dtype == torch.int64 and count == (x.to(wide).abs() > alpha).sum()

        grad = torch.tensor(0.3, dtype=wide)
        grad_x = ops.l1_norm_backward(grad, layout(x))
        assert_layout(grad_x, layout(x))
        assert torch.equal(grad_x, (grad * x.sign().to(wide)).to(dtype))


# --- all operators ----------------------------------------------------------------------------------------------------


@pytest.mark.every_mode
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (0, 4), (2, 0)], ids=str)
def test_empty_tensors(ops, shape):
    u, channels = torch.empty(shape), shape[1]
    for theta in (torch.tensor(0.5), torch.full((channels,), 0.5)):
        assert ops.soft_threshold(u, theta, torch.zeros(channels), u, False).shape == shape
        assert ops.shrink(u, theta, "gelu", False).shape == shape
        grad_u, grad_theta, grad_bias = ops.soft_threshold_backward(u, u, theta, False)
        assert grad_u.shape == shape
        assert torch.equal(grad_theta, torch.zeros_like(theta)) and torch.equal(grad_bias, torch.zeros(channels))
        grad_u, grad_theta = ops.shrink_backward(u, u, theta, "gelu", False)
        assert grad_u.shape == shape and torch.equal(grad_theta, torch.zeros_like(theta))
    norm, count = ops.l1_norm(u, 1e-6)
    assert norm == 0 and count == 0 and ops.l1_norm_backward(norm, u).shape == shape


@over_dtypes
def test_nan_and_infinity_pass_as_in_eager(ops, dtype):
    u = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 2.0, -2.0], dtype=dtype)
    theta, grad = torch.tensor(0.5, dtype=dtype), torch.linspace(1, 7, 7).to(dtype)
    close = {"equal_nan": True, "rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for one_sided in (False, True):
        codes = ops.soft_threshold(u, theta, None, None, one_sided)
        torch.testing.assert_close(codes, eager_soft(u, theta, None, None, one_sided), **close)
        grad_u, _, _ = ops.soft_threshold_backward(grad, codes, theta, one_sided)
        torch.testing.assert_close(grad_u, eager_soft_backward(grad, codes, theta)[0], **close)
        for activation in RHO:
            out = ops.shrink(u, theta, activation, one_sided)
            # Value by value: in a vector of AVX-512 PyTorch's gelu of infinity is NaN, alone it is infinity.
            plain = torch.cat([eager_shrink(value, theta, activation, one_sided) for value in u.split(1)])
            torch.testing.assert_close(out, plain, **close)
            # From the second element on: the derivative at NaN is no number's, and eager's differ among themselves.
            grad_u, _ = ops.shrink_backward(grad[1:], u[1:], theta, activation, one_sided)
            expected, _ = eager_shrink_backward(grad[1:], u[1:], theta, activation, one_sided)
            torch.testing.assert_close(grad_u, expected, **close)
    assert ops.l1_norm(u, 1.0)[0].isnan() and ops.l1_norm(u, 1.0)[1] == 4
    assert ops.l1_norm(u[1:], 1.0)[0].isinf()


@pytest.mark.every_mode
def test_results_do_not_vary(ops):
    """Every call runs blocks and threads in another order, on a small device fewer: the bits have to be the same."""
    for layout in (contiguous, channels_last):
        u, theta, grad = (layout(x) for x in random_inputs((3, 5, 41, 37), torch.float32, True))
        calls = [
            lambda u=u, theta=theta, grad=grad: ops.soft_threshold_backward(grad, u, theta, False),
            lambda u=u, theta=theta, grad=grad: ops.shrink_backward(grad, u, theta, "mish", False),
            lambda u=u: ops.l1_norm(u, 1.0),
            lambda u=u, theta=theta, grad=grad: [ops.soft_threshold(u, theta, None, grad, False)],
        ]
        for call in calls:
            first = call()
            with ops.device(1):
                second = call()
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unsupported_dtype_is_refused(ops):
    with pytest.raises(RuntimeError, match="takes float32, float64, bfloat16 or float16"):
        ops.l1_norm_backward(torch.tensor(1.0), torch.ones(3, dtype=torch.int32))


# --- csrc/core/scalar.h -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def scalar(cuda_sim):
    scalar = cuda_sim.object(SIM / "scalar.cpp", "-O2")
    library = ctypes.CDLL(str(cuda_sim.link("scalar.so", None, [scalar], "-shared").result()))

    def convert(name: str, source: torch.Tensor, target: torch.dtype) -> torch.Tensor:
        out = torch.empty(source.shape, dtype=target)
        size = ctypes.c_int64(source.numel())
        getattr(library, name)(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()), size)
        return out

    return convert


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("name", HALVES)
def test_every_bit_pattern_loads_as_in_torch(scalar, name):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    expected = bits.view(HALVES[name]).float()
    out = scalar(f"load_{name}", bits, torch.float32)
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(out.view(torch.int32)[number], expected.view(torch.int32)[number])


@pytest.mark.parametrize("name", HALVES)
def test_store_rounds_as_torch(scalar, name):
    torch.manual_seed(0)
    dtype = HALVES[name]
    anything = torch.randint(-(2**31), 2**31, (2**21,), dtype=torch.int64).to(torch.int32)
    # Every number of the half type, its neighbours in float32, and the ties half way to the next with their neighbours.
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ahead = torch.arange(1, 2**16 + 1, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = ((numbers.double() + ahead.double()) / 2).float()
    near = torch.cat([numbers.view(torch.int32), ties.view(torch.int32)])
    # Exponents at which float16 overflows, becomes subnormal and vanishes.
    small = torch.randint(0x33000000 - 2**23, 0x38800000 + 2**23, (2**20,), dtype=torch.int32)
    large = torch.randint(0x47000000, 0x48000000, (2**18,), dtype=torch.int32)
    patterns = torch.cat([anything, near, near + 1, near - 1, small, large])
    for bits in (patterns, patterns ^ -(2**31)):
        x = bits.view(torch.float32)
        expected = x.to(dtype)
        out = scalar(f"store_{name}", x, torch.int16).view(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(out.view(torch.int16)[number], expected.view(torch.int16)[number])
