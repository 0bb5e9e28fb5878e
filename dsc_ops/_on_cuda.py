"""What the convolution operators are on CUDA: kernels on packed codes (csrc/cuda/packed.cuh) where they serve, else the
library's convolution and the fused epilogue (dsc_ops/_composed.py).

Packed kernels are for dictionaries of images and signals: few channels, kernels that have some width. A wide dictionary
is a large matrix product, which the library does well, and its codes are a small part of its arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_ops import _composed

ops = torch.ops.dsc_ops

MOST_CHANNELS = 4
# (stride, widths of the segments that a kernel row is cut into); csrc/cuda/packed.h has the same table in visit_tiling.
SEGMENTS = {1: (7, 5, 4, 3), 2: (7, 5, 3)}
DOUBLE_SEGMENTS = {1: (3,)}
LARGEST_TILE = 64 * 1024  # bytes of signal in the shared memory of a block


def is_packed(y: Tensor, weight_shape, stride, dilation, groups: int) -> bool:
    """Whether the packed kernels serve; weight_shape (M, C, *kernel)."""
    atoms, channels, *kernel = weight_shape
    widths = (DOUBLE_SEGMENTS if y.dtype == torch.float64 else SEGMENTS).get(stride[-1], ())
    if groups != 1 or any(d != 1 for d in dilation) or not 0 < channels <= MOST_CHANNELS or atoms == 0:
        return False
    rows = 8 if y.dim() == 3 else 7 * stride[0] + kernel[0]  # of a 1-D batch, each signal is a row
    tile = channels * rows * (31 * stride[-1] + kernel[-1]) * (8 if y.dtype == torch.float64 else 4)
    return y.numel() > 0 and tile <= LARGEST_TILE and any(kernel[-1] % width == 0 for width in widths)


def tensor_cores() -> bool:
    """Whether float32 products may be taken in tf32: only where torch.set_float32_matmul_precision allows it."""
    return torch.get_float32_matmul_precision() != "highest"


def wide(t: Tensor | None) -> Tensor | None:
    """In the type of sums."""
    return t if t is None or t.dtype == torch.float64 else t.float()


def empty_tape(y, dictionary, theta, codes, stride, dilation, groups, keep_tape: bool) -> Tensor:
    """A tensor as the tape that `lista` returns. Packed, its size is tape_bytes of csrc/cuda/lista.cu."""
    iterations = theta.shape[0]
    if not is_packed(y, dictionary.shape, stride, dilation, groups) or iterations == 0:
        return codes.new_empty([iterations, *codes.shape] if keep_tape else 0)
    value_size = 8 if y.dtype == torch.float64 else 4
    batch, atoms, *rows, width = codes.shape
    runs = batch * (rows[0] if rows else 1) * ((width + 7) // 8)
    slabs = (atoms + 63) // 64
    code = slabs * runs * 64 + runs * 8 * atoms * value_size
    size = iterations * (code + y.numel() * value_size)
    return codes.new_empty(size if keep_tape else 0, dtype=torch.uint8)


def conv_soft_threshold(y, weight, bias, theta, stride, padding, dilation, groups, one_sided) -> Tensor:
    if not is_packed(y, weight.shape, stride, dilation, groups):
        return _composed.conv_soft_threshold(y, weight, bias, theta, stride, padding, dilation, groups, one_sided)
    thetas = wide(theta).expand(weight.shape[0])
    return ops.packed_conv_soft_threshold(y, weight, wide(bias), thetas, stride, padding, one_sided, tensor_cores())


def conv_soft_threshold_backward(
    grad, codes, y, weight, theta, stride, padding, dilation, groups, one_sided, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not is_packed(y, weight.shape, stride, dilation, groups):
        return _composed.conv_soft_threshold_backward(
            grad, codes, y, weight, theta, stride, padding, dilation, groups, one_sided, needs
        )
    grad_y, grad_weight, sums = ops.packed_conv_soft_threshold_backward(
        grad, codes, y, weight, stride, padding, needs, tensor_cores()
    )
    none = y.new_empty(0)
    grad_theta, grad_bias = (sums[0].clone(), sums[1].clone()) if needs[2] or needs[3] else (none, none)
    if needs[3] and theta.dim() == 0:
        grad_theta = grad_theta.sum()
    return grad_y.to(y.dtype), grad_weight, grad_bias if needs[2] else none, grad_theta if needs[3] else none


def lista(
    y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups, one_sided, keep_tape
) -> tuple[Tensor, Tensor]:
    if not is_packed(y, dictionary.shape, stride, dilation, groups) or theta.shape[0] == 0:
        return _composed.lista(
            y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups, one_sided, keep_tape
        )
    return ops.packed_lista(
        y, dictionary, analysis, wide(theta), x0, momentum, stride, padding, one_sided, keep_tape, tensor_cores()
    )


def lista_backward(
    grad, tape, y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups, one_sided, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not is_packed(y, dictionary.shape, stride, dilation, groups) or theta.shape[0] == 0:
        return _composed.lista_backward(
            grad,
            tape,
            y,
            dictionary,
            analysis,
            theta,
            x0,
            momentum,
            stride,
            padding,
            dilation,
            groups,
            one_sided,
            needs,
        )
    grad_y, grad_dictionary, grad_analysis, grad_theta, grad_x0 = ops.packed_lista_backward(
        grad, tape, y, dictionary, analysis, wide(theta), x0, momentum, stride, padding, needs, tensor_cores()
    )
    if needs[3]:
        grad_theta = grad_theta[:, 0].contiguous()
    return grad_y.to(y.dtype), grad_dictionary, grad_analysis, grad_theta, grad_x0


def register(library: torch.library.Library, device: str = "CUDA", **options) -> None:
    """Make these the operators' implementations."""
    for function in (
        _composed.analysis,
        _composed.synthesis,
        _composed.correlation,
        _composed.use_large_pages,
        _composed.dilated_convolution_,
        _composed.dilated_correlation,
        _composed.norm_relu_,
        _composed.unfold_norm_relu_,
        _composed.norm_relu_backward_,
        conv_soft_threshold,
        conv_soft_threshold_backward,
        lista,
        lista_backward,
    ):
        library.impl(function.__name__, function, device, **options)
