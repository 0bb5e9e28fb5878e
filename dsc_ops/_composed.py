"""The convolution operators composed of the library's convolution and the fused epilogue: a step of `lista` is one
transposed convolution, one convolution and one pass of `soft_threshold` with residual.

What CUDA has for shapes that its packed kernels do not serve (dsc_ops/_on_cuda.py), and what it has for the passes of
the MSD-CSC block. The functions run on any device that has `soft_threshold` and its backward, so the tests run them on
the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ops = torch.ops.dsc_ops
aten = torch.ops.aten


def analysis(y: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    return aten.convolution(y, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


def synthesis(x: Tensor, weight: Tensor, signal_size, stride, padding, dilation, groups: int) -> Tensor:
    sizes = zip(signal_size, x.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    extra = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, s, p, d, k in sizes]
    return aten.convolution(x, weight, None, stride, padding, dilation, True, extra, groups)


def correlation(y: Tensor, x: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Tensor:
    weight = y.new_empty([x.shape[1], y.shape[1] // groups, *kernel_size])
    needs = [False, True, False]
    none = [0] * len(stride)
    return aten.convolution_backward(x, y, weight, None, stride, padding, dilation, False, none, groups, needs)[1]


def conv_soft_threshold(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    theta: Tensor,
    stride,
    padding,
    dilation,
    groups: int,
    one_sided: bool,
) -> Tensor:
    u = analysis(y, weight, stride, padding, dilation, groups).contiguous()
    return ops.soft_threshold(u, theta, bias, None, one_sided)


def conv_soft_threshold_backward(
    grad: Tensor,
    codes: Tensor,
    y: Tensor,
    weight: Tensor,
    theta: Tensor,
    stride,
    padding,
    dilation,
    groups: int,
    one_sided: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = (stride, padding, dilation, groups)
    grad_u, grad_theta, grad_bias = ops.soft_threshold_backward(grad, codes, theta, one_sided)
    return (
        synthesis(grad_u, weight, y.shape[2:], *geometry).contiguous() if needs[0] else y.new_empty(0),
        correlation(y, grad_u, weight.shape[2:], *geometry).contiguous() if needs[1] else y.new_empty(0),
        grad_bias if needs[2] else y.new_empty(0),
        grad_theta if needs[3] else y.new_empty(0),
    )


def _extrapolate(x: Tensor | None, before: Tensor | None, weight: float) -> Tensor | None:
    """z_k = x_k + weight (x_k - x_{k-1}); None is a zero code."""
    if x is None or weight == 0:
        return x
    return x * (1 + weight) if before is None else torch.lerp(before, x, 1 + weight)


def lista(
    y: Tensor,
    dictionary: Tensor,
    analysis_weight: Tensor,
    theta: Tensor,
    x0: Tensor | None,
    momentum: list[float],
    stride,
    padding,
    dilation,
    groups: int,
    one_sided: bool,
    keep_tape: bool,
) -> tuple[Tensor, Tensor]:
    geometry = (stride, padding, dilation, groups)
    iterations = theta.shape[0]
    codes, before = x0, x0
    tape: list[Tensor] = []
    for k in range(iterations):
        weight = analysis_weight[0 if analysis_weight.shape[0] == 1 else k]
        z = _extrapolate(codes, before, momentum[k] if momentum and k else 0.0)
        residual = y if z is None else y - synthesis(z, dictionary, y.shape[2:], *geometry)
        u = analysis(residual, weight, *geometry).contiguous()
        before, codes = codes, ops.soft_threshold(u, theta[k].contiguous(), None, z, one_sided)
        if keep_tape:
            tape.append(codes)
    return codes, torch.stack(tape) if keep_tape else codes.new_empty(0)


def lista_backward(
    grad: Tensor,
    tape: Tensor,
    y: Tensor,
    dictionary: Tensor,
    analysis_weight: Tensor,
    theta: Tensor,
    x0: Tensor | None,
    momentum: list[float],
    stride,
    padding,
    dilation,
    groups: int,
    one_sided: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    geometry = (stride, padding, dilation, groups)
    signal_size, kernel_size = y.shape[2:], dictionary.shape[2:]
    sums = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need else y.new_empty(0)
        for t, need in zip((y, dictionary, analysis_weight, theta), needs, strict=False)
    ]
    grad_y, grad_dictionary, grad_analysis, grad_theta = sums
    x = [x0, *tape]
    grad_x, grad_before = grad, None  # of x_{k+1}; of x_k by way of z_{k+1}
    for k in reversed(range(theta.shape[0])):
        from_zero = k == 0 and x0 is None
        shared = 0 if analysis_weight.shape[0] == 1 else k
        weight = momentum[k] if momentum and k else 0.0
        z = _extrapolate(x[k], x[k - 1] if k else None, weight)
        grad_u, step_theta, _ = ops.soft_threshold_backward(grad_x, x[k + 1], theta[k].contiguous(), one_sided)
        if needs[3]:
            grad_theta[k] = step_theta
        if needs[2]:
            residual = y if z is None else y - synthesis(z, dictionary, signal_size, *geometry)
            grad_analysis[shared] += correlation(residual, grad_u, kernel_size, *geometry)
        if from_zero and not needs[0]:
            break
        grad_residual = synthesis(grad_u, analysis_weight[shared], signal_size, *geometry)
        if needs[0]:
            grad_y += grad_residual
        if from_zero:
            break
        if needs[1]:
            grad_dictionary -= correlation(grad_residual, z, kernel_size, *geometry)
        if k == 0 and not needs[4]:
            break
        grad_z = grad_u - analysis(grad_residual, dictionary, *geometry)
        grad_x = grad_z * (1 + weight)
        if grad_before is not None:
            grad_x = grad_x + grad_before
        grad_before = grad_z * -weight if weight else None
    return grad_y, grad_dictionary, grad_analysis, grad_theta, grad_x.contiguous() if needs[4] else y.new_empty(0)


# --- the passes of the MSD-CSC block ----------------------------------------------------------------------------------


def _taps(height: int, width: int, dilation: int) -> Iterator[tuple[int, tuple, tuple]]:
    """(tap, the pixels it reaches, the pixels it reads) of a 3x3 kernel with padding = dilation."""
    axes = []
    for size in (height, width):
        offsets = [(tap, (tap - 1) * dilation) for tap in range(3)]
        axes.append([(t, slice(max(0, -o), size - max(0, o)), slice(max(0, o), size - max(0, -o))) for t, o in offsets])
    for row, to_row, from_row in axes[0]:
        for column, to_column, from_column in axes[1]:
            if to_row.start < to_row.stop and to_column.start < to_column.stop:
                yield 3 * row + column, (..., to_row, to_column), (..., from_row, from_column)


def shifts(x: Tensor, dilation: int) -> Tensor:
    out = x.new_zeros(x.shape[0], 9, *x.shape[1:])
    for tap, to, of in _taps(*x.shape[2:], dilation):
        out[:, tap][of] = x[to]
    return out.flatten(1, 2)


def sum_of_shifts(x: Tensor, dilation: int) -> Tensor:
    x = x.unflatten(1, (9, -1))
    out = x[:, 4].clone(memory_format=torch.contiguous_format)
    for tap, to, of in _taps(*x.shape[3:], dilation):
        if tap != 4:
            out[to] += x[:, tap][of]
    return out


def _wide(x: Tensor) -> Tensor:
    """In the type of sums."""
    return x if x.dtype == torch.float64 else x.float()


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _sum(x: Tensor) -> Tensor:
    """Of each channel."""
    return x.flatten(2).sum(-1).sum(0)


def use_large_pages(memory: Tensor) -> None:
    """A GPU has none other."""


# Values of the shifted channels at a time: enough to fill a GPU.
SHIFTED = 2**26


def _chunks(x: Tensor, width: int) -> Iterator[slice]:
    """Samples that are worked on together."""
    each = 9 * width * x.shape[2] * x.shape[3]
    count = max(1, SHIFTED // max(each, 1))
    return (slice(first, first + count) for first in range(0, x.shape[0], count))


def dilated_convolution_(
    out: Tensor, x: Tensor, weight: Tensor, dilation: int, transposed: bool, base: Tensor | None
) -> None:
    """A product of matrices for each sample; its nine rows of w channels are shifted and added, or w shifted channels
    are multiplied: what is shifted is small."""
    taps = weight.permute(2, 3, 0, 1).reshape(9 * weight.shape[0], weight.shape[1])
    matrix = taps.t() if transposed else taps
    if transposed and base is not out:
        out.copy_(base) if base is not None else out.zero_()
    for part in _chunks(x, weight.shape[0]):
        matrices = _wide(matrix).expand(x[part].shape[0], -1, -1)
        if transposed:
            sums, shifted = out[part].flatten(2), _wide(shifts(x[part], dilation).flatten(2))
            if sums.dtype == shifted.dtype:
                sums.baddbmm_(matrices, shifted)
            else:
                sums.copy_(torch.baddbmm(_wide(sums), matrices, shifted))
        else:
            products = torch.bmm(matrices, _wide(x[part].flatten(2))).unflatten(2, x.shape[2:])
            sums = sum_of_shifts(products, dilation)
            out[part] = sums if base is None else base[part] + sums


def dilated_correlation(x: Tensor, z: Tensor, dilation: int) -> Tensor:
    gradient = _wide(x.new_zeros(9 * z.shape[1], x.shape[1]))
    for part in _chunks(x, z.shape[1]):
        shifted = _wide(shifts(z[part], dilation).flatten(2))
        gradient += torch.bmm(shifted, _wide(x[part].flatten(2)).transpose(1, 2)).sum(0)
    return gradient.view(3, 3, z.shape[1], x.shape[1]).permute(2, 3, 0, 1).contiguous()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x, count = _wide(x), max(1, x.numel() // max(1, x.shape[1]))
    mean = _sum(x) / count
    return mean, torch.linalg.vector_norm((x - _per_channel(mean)).flatten(2), dim=-1).square().sum(0) / count


def norm_relu_(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
    out: Tensor | None = None,
) -> None:
    if training:
        m, v = moments(x)
        mean.copy_(scale * m + bias)
        variance.copy_(scale.square() * v)
    slope = gamma * torch.rsqrt(variance + eps)
    shift = slope * (bias - mean) + beta
    out = x if out is None else out
    torch.addcmul(_per_channel(shift.to(x.dtype)), x, _per_channel((slope * scale).to(x.dtype)), out=out).relu_()


def unfold_norm_relu_(
    u: Tensor,
    g: Tensor,
    e: Tensor,
    scale: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
    out: Tensor,
    error: bool,
) -> None:
    handed, factor = e.shape[1], scale.to(u.dtype)
    u[:, :handed] = torch.addcmul(g[:, :handed], e, factor, value=-1)
    u[:, handed:] = torch.addcmul(g[:, handed:], u[:, handed:], factor, value=-1)
    result = torch.empty_like(out) if error else out
    norm_relu_(u, torch.ones_like(scale), bias, gamma, beta, mean, variance, training, eps, result)
    if error:
        torch.sub(g, result, out=out)


def norm_relu_backward_(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    beta: Tensor,
    inverse: Tensor,
    training: bool,
    factor: Tensor,
    handed: int,
    e: Tensor | None,
    share: Tensor | None,
    error: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = max(1, x.numel() // max(1, x.shape[1]))
    through, wide_x = _wide(grad), _wide(x)
    xhat = torch.addcmul(_per_channel(shift), wide_x, _per_channel(scale))
    z = torch.addcmul(_per_channel(beta), xhat, _per_channel(gamma))
    through = aten.threshold_backward(through, z, 0)
    grad_beta, grad_gamma = _sum(through), _sum(torch.mul(through, xhat, out=z))
    slope = gamma * inverse
    grad_u = through * _per_channel(slope)
    if training:
        grad_u -= torch.addcmul(_per_channel(slope * grad_beta / count), xhat, _per_channel(slope * grad_gamma / count))
    dot = torch.zeros_like(gamma)
    with_e = wide_x if e is None else _wide(e)
    dot[: with_e.shape[1]] = _sum(grad_u[:, : with_e.shape[1]] * with_e)
    if share is not None:
        share.copy_(grad_u - grad if error else grad_u)
    grad_u[:, :handed] *= factor
    grad.copy_(grad_u)
    return grad_gamma, grad_beta, dot
