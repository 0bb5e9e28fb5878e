"""Convolutional dictionaries as the matrices that they are: D (m, d) with S_W(x) = D x, atoms in columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_ops import _checks
from dsc_ops.theory import _checks as check

__all__ = ["conv_coherence", "conv_matrix", "stripe_norm"]

Size = int | Sequence[int]
Padding = int | Sequence[int] | str


def conv_matrix(
    weight: Tensor,
    signal_size: Size,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """The matrix D of a convolutional dictionary: S_W(x) = D x and A_W(y) = D^T y, for flattened codes and signals.

    Args:
        weight: (M, C/groups, *kernel), one or two dimensions.
        signal_size: spatial size of the signal.
        stride, padding, dilation, groups: as in :func:`dsc_ops.functional.synthesis`.

    Returns:
        Sparse COO tensor (m, d), coalesced, m = C prod(signal_size), d = M prod(code_size): at most C/groups
        prod(kernel) values in a column. Source: Papyan, Sulam, Elad (IEEE Transactions on Signal Processing, 2017).

    >>> conv_matrix(torch.tensor([[[1.0, 2.0]]]), 3).to_dense()
    tensor([[1., 0.],
            [2., 1.],
            [0., 2.]])
    """
    name = "conv_matrix"
    weight = _checks.weight(name, "weight", weight)
    conv = _checks.geometry(name, "weight", weight, stride, padding, dilation, groups)
    size = _checks.integers(name, "signal_size", signal_size, weight.dim() - 2, least=1)
    code_size = _checks.code_size(name, "a signal", size, weight, conv)
    return _matrix(weight, size, code_size, conv)


def _matrix(weight: Tensor, size: Sequence[int], code_size: Sequence[int], conv: _checks.Geometry) -> Tensor:
    atoms, channels, *kernel = weight.shape
    device = weight.device

    def along(count: int, axis: int) -> Tensor:
        """0 .. count - 1 along one of the axes (atom, channel, *code pixel, *kernel pixel)."""
        shape = [1] * (2 + 2 * len(size))
        shape[axis] = count
        return torch.arange(count, device=device).reshape(shape)

    atom, channel = along(atoms, 0), along(channels, 1)
    column, row = atom, channel + atom // (atoms // conv.groups) * channels
    inside = torch.ones((), dtype=torch.bool, device=device)
    for axis, n in enumerate(size):
        place = along(code_size[axis], 2 + axis)
        offset = along(kernel[axis], 2 + len(size) + axis)
        pixel = place * conv.stride[axis] - conv.padding[axis] + offset * conv.dilation[axis]
        inside = inside & (pixel >= 0) & (pixel < n)
        column, row = column * code_size[axis] + place, row * n + pixel
    shape = (atoms, channels, *code_size, *kernel)
    inside = inside.expand(shape)
    values = weight.reshape(atoms, channels, *[1] * len(size), *kernel).expand(shape)[inside]
    indices = torch.stack([row.expand(shape)[inside], column.expand(shape)[inside]])
    matrix_shape = (channels * conv.groups * math.prod(size), atoms * math.prod(code_size))
    return torch.sparse_coo_tensor(indices, values, matrix_shape, check_invariants=False).coalesce()


def conv_coherence(
    weight: Tensor,
    signal_size: Size,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> float:
    """Mutual coherence of a convolutional dictionary, exactly, without its matrix, for signals of any size.

    Two atoms overlap only within a kernel's extent e = dilation (kernel - 1) + 1, and only those that the border cuts
    differ from the ones inside. So a signal of at least 3 e + 2 stride pixels along each axis, of the same length
    modulo the stride, has all the pairs of a larger one; the pairs of one shift and the same cuts are one product of
    two M x C prod(kernel) matrices.

    Args:
        weight: the dictionary, as in :func:`conv_matrix`, which has the other arguments too.

    Returns:
        mu of ``conv_matrix(...)``, atoms cut by the border included. Raises ValueError when an atom has no value inside
        the signal, which has no coherence then. Source: Papyan, Sulam, Elad (2017), for periodic signals.

    >>> round(conv_coherence(torch.tensor([[[1.0, 2.0]]]), 10**6), 4)
    0.4
    """
    name = "conv_coherence"
    weight = _checks.weight(name, "weight", weight)
    conv = _checks.geometry(name, "weight", weight, stride, padding, dilation, groups)
    size = _checks.integers(name, "signal_size", signal_size, weight.dim() - 2, least=1)
    _checks.code_size(name, "a signal", size, weight, conv)
    pairs = []
    for n, k, s, p, d in zip(size, weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True):
        least = 3 * (d * (k - 1) + 1) + 2 * s
        pairs.append(_overlaps(min(n, least + (n - least) % s), k, s, p, d))
    full = without_groups(check.wide(weight), conv.groups)
    norms: dict[tuple[_Cut, ...], Tensor] = {}

    def inverse_norms(cuts: tuple[_Cut, ...]) -> Tensor:
        if cuts not in norms:
            inside = (slice(None), slice(None), *[slice(low, high) for low, high in cuts])
            norms[cuts] = full[inside].flatten(1).norm(dim=1)
            if (norms[cuts] == 0).any():
                atom = int((norms[cuts] == 0).nonzero()[0])
                raise ValueError(
                    f"{name}: padding is {tuple(conv.padding)}, it leaves nothing of atom {atom} at the border"
                )
        return 1 / norms[cuts]

    mu = 0.0
    for combination in itertools.product(*pairs):
        cuts, others, shifts = zip(*combination, strict=True)
        scale = inverse_norms(cuts).unsqueeze(1) * inverse_norms(others)
        shared = [
            (max(low, t), min(high, k + t)) for (low, high), t, k in zip(cuts, shifts, full.shape[2:], strict=True)
        ]
        if all(low < high for low, high in shared):
            here = (slice(None), slice(None), *[slice(low, high) for low, high in shared])
            there = (slice(None), slice(None), *[slice(a - t, b - t) for (a, b), t in zip(shared, shifts, strict=True)])
            products = full[here].flatten(1) @ full[there].flatten(1).T * scale
            if not any(shifts):  # an atom with itself
                products.fill_diagonal_(0)
            mu = max(mu, float(products.abs().max()))
    return mu


_Cut = tuple[int, int]  # the kernel's pixels that lie inside the signal: from, to


def _overlaps(n: int, k: int, s: int, p: int, d: int) -> list[tuple[_Cut, _Cut, int]]:
    """How two kernels may lie along one axis: what the border leaves of each, and their shift in kernel pixels.

    Pixel o of the one and pixel o - shift of the other are the same pixel of the signal.
    """
    cuts = []
    for place in range((n + 2 * p - d * (k - 1) - 1) // s + 1):
        start = place * s - p
        cuts.append((max(0, -(start // d)), max(0, min(k, -((start - n) // d)))))
    found = set()
    for one, cut in enumerate(cuts):
        for other, other_cut in enumerate(cuts):
            shift, rest = divmod((other - one) * s, d)
            if rest == 0 and abs(shift) < k:
                found.add((cut, other_cut, shift))
    return sorted(found)


def without_groups(weight: Tensor, groups: int) -> Tensor:
    """The same convolution with one group: zeros where a group sees nothing."""
    atoms, channels, *kernel = weight.shape
    full = weight.new_zeros(groups, atoms // groups, groups, channels, *kernel)
    for group, block in enumerate(weight.reshape(groups, atoms // groups, channels, *kernel)):
        full[group, :, group] = block
    return full.reshape(atoms, groups * channels, *kernel)


def stripe_norm(x: Tensor, kernel_size: Size, *, stride: Size = 1, dilation: Size = 1, alpha: float = 0.0) -> Tensor:
    """Stripe norm l_{0,inf}: the largest number of non-zeros in any stripe of a code.

    A stripe holds all channels of the 2 k - 1 places around one (along each axis), whose atoms share pixels with its;
    with a stride, 2 ceil(k / stride) - 1. :func:`uniqueness_bound` holds for it in place of ||x||_0.

    Args:
        x: code (N, M, *code_size).
        kernel_size, stride, dilation: of the dictionary; k is dilation (kernel - 1) + 1.
        alpha: values of at most this size are zeros.

    Returns:
        (N,), integers. Source: Papyan, Sulam, Elad (IEEE Transactions on Signal Processing, 2017).

    >>> stripe_norm(torch.tensor([[[1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0]]]), 2)
    tensor([2])
    """
    name = "stripe_norm"
    x = _checks.tensor(name, "x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, it takes (N, M, *code_size) with one or two axes")
    dims = x.dim() - 2
    kernel = _checks.integers(name, "kernel_size", kernel_size, dims, least=1)
    stride = _checks.integers(name, "stride", stride, dims, least=1)
    dilation = _checks.integers(name, "dilation", dilation, dims, least=1)
    alpha = _checks.number(name, "alpha", alpha, least=0)
    counts = (x.detach().abs() > alpha).sum(dim=1, keepdim=True).to(torch.float64)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        reach = (d * (k - 1)) // s  # places further away share no pixel
        shape = [1, 1] + [1] * dims
        shape[2 + axis] = 2 * reach + 1
        padding = [reach if a == axis else 0 for a in range(dims)]
        conv = F.conv1d if dims == 1 else F.conv2d
        counts = conv(counts, counts.new_ones(shape), padding=padding)
    if counts[0:1].numel() == 0:
        return counts.new_zeros(x.shape[0], dtype=torch.int64)
    return counts.flatten(1).amax(dim=1).round().to(torch.int64)
