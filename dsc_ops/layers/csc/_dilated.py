"""The MSD-CSC block as one operator: forward and backward on buffers that nothing is concatenated to.

Layer i has the dictionary D_i = [I, F_i^T] on codes of C_i = C_0 + i w channels, so D_i^T x = [x; F_i x], and channels
C_{i-1} .. C_i of a buffer (N, C_d, H, W) are what F_i made. With T_i(u) = relu(BN_i(u)):

    pass 0     x_i = T_i(c_i [x_{i-1}; F_i x_{i-1}] + b_i)                                      i = 1 .. d, x_0 = y
    pass p     down  g_{i-1} = D_i g_i = g_i[:C_{i-1}] + F_i^T g_i[C_{i-1}:]                    i = d .. 1, g_d = x_d
               up    e_{i-1} = g_{i-1} - x_{i-1},  x_i = T_i(g_i - c_i [e_{i-1}; F_i e_{i-1}] + b_i)

Pass 0 changes a channel that is handed on by a per-channel map alone, relu(A x + B). A chain of such maps is one
clamp(A x + B, low, high), so the tape holds each channel once, as F made it, and backward makes x_i of it for any i.
Down, g_{i-1} is made in the place of e_{i-1}, and the tape keeps what each F_i^T was applied to. Up, one pass over a
channel makes u_i = g_i - c_i [e; F e], which the tape holds as it holds e_{i-1}, batch norm's moments, and e_i in the
place of g_i: no x_i but the last is ever stored. F x, F^T z and the gradient of F are convolutions on slices of
channels as they lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_ops import reference

ops = torch.ops.dsc_ops


# --- F x, F^T z and the gradient of F, on slices of channels ----------------------------------------------------------


def analysis(x: Tensor, weight: Tensor, dilation: int, out: Tensor, base: Tensor | None = None) -> None:
    """out = F x, or base + F x."""
    ops.dilated_convolution_(out, x, weight, dilation, False, base)


def add_synthesis(base: Tensor, weight: Tensor, z: Tensor, dilation: int, out: Tensor) -> None:
    """out = base + F^T z; out may be base."""
    ops.dilated_convolution_(out, z, weight, dilation, True, base)


def correlation(x: Tensor, z: Tensor, dilation: int) -> Tensor:
    """corr(x, z), (w, C, 3, 3): the gradient of F where z is that of F x, or x that of F^T z."""
    return ops.dilated_correlation(x, z, dilation)


# --- batch norm and ReLU ----------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums over values of this type are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, 1, 1)


@dataclass
class Norm:
    """Batch norm of u = scale x + b as a map of x: xhat = P x + Q, then gamma xhat + beta."""

    inverse: Tensor  # 1 / standard deviation of u
    P: Tensor
    Q: Tensor
    gamma: Tensor
    beta: Tensor

    def gradient(
        self, grad: Tensor, x: Tensor, training: bool, scale: Tensor, handed: int, e=None, share=None, error=False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """grad becomes that of u, times scale in the channels that are handed on, as ops.norm_relu_backward_ says.

        Returns the gradients of gamma, beta and b, and the sum over all values of that of u times e, or x.
        """
        values = (self.P, self.Q, self.gamma, self.beta, self.inverse)
        grad_gamma, grad_beta, dot = ops.norm_relu_backward_(grad, x, *values, training, scale, handed, e, share, error)
        # In training the mean takes b away: its gradient is zero.
        return grad_gamma, grad_beta, 0 if training else self.gamma * self.inverse * grad_beta, dot.sum()


# --- the block --------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """The arguments, and where everything lies on the tape."""

    filters: list[Tensor]
    scale: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    dilations: Sequence[int]
    unfoldings: int
    fista: bool
    training: bool
    eps: float
    width: int
    first: int  # channels of the signal

    def __post_init__(self) -> None:
        self.depth = len(self.filters)
        self.channels = [self.first + i * self.width for i in range(self.depth + 1)]
        self.momentum = reference.momentum_weights("fista" if self.fista else None, 1 + self.unfoldings)[1:]

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Each layer's part of one value for each channel of each code."""
        return flat.split(self.channels[1:], -1)

    def parameters(self, mean: Tensor) -> list[tuple[Tensor, ...]]:
        """b, gamma and beta of each layer, in the type of sums."""
        return list(zip(*(self.split(t.to(mean)) for t in (self.bias, self.gamma, self.beta)), strict=True))

    def norms(self, p: int, mean: Tensor, variance: Tensor) -> list[Norm]:
        """Of each layer in pass p."""
        inverse = torch.rsqrt(variance[p] + self.eps)
        shift = (self.bias.to(mean) - mean[p]) * inverse
        scales = self.scale.to(mean)
        P = torch.cat([c * t for c, t in zip(scales, self.split(inverse), strict=True)]) if p == 0 else inverse
        values = (inverse, P, shift, self.gamma.to(mean), self.beta.to(mean))
        return [Norm(*parts) for parts in zip(*(self.split(t) for t in values), strict=True)]

    @property
    def pass_channels(self) -> int:
        """What an unfolding keeps: what each F_i^T was applied to, u_1 .. u_d, e_0 .. e_{d-1}."""
        return self.channels[-1] - self.first + sum(self.channels[1:]) + sum(self.channels[:-1])


class Tape:
    """Views of pieces of memory: the channels of pass 0, and z, u_i and e_i of each unfolding, or where the tape is not
    kept of one in turn."""

    def __init__(self, memory: Sequence[Tensor], block: Block, shape: torch.Size):
        self.memory, self.block = memory, block
        self.batch, _, self.height, self.length = shape
        self.pixels = self.batch * self.height * self.length

    @staticmethod
    def sizes(block: Block, shape: torch.Size, kept: bool) -> list[int]:
        """Of the pieces: one for each pass, which memory that is freed serves again sooner than one for all."""
        passes = block.unfoldings if kept else min(block.unfoldings, 1)
        pixels = shape[0] * shape[2] * shape[3]
        return [pixels * block.channels[-1], *[pixels * block.pass_channels] * passes]

    def _view(self, memory: Tensor, first: int, channels: int) -> Tensor:
        piece = memory[first * self.pixels : (first + channels) * self.pixels]
        return piece.view(self.batch, channels, self.height, self.length)

    def raw(self) -> Tensor:
        return self._view(self.memory[0], 0, self.block.channels[-1])

    def unfolding(self, p: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """z, of layer after layer, [u_1 .. u_d], [e_0 .. e_{d-1}] of unfolding p = 1, 2, ..."""
        memory, at, pieces = self.memory[min(p, len(self.memory) - 1)], 0, []
        new = self.block.channels[-1] - self.block.first
        for channels in (new, *self.block.channels[1:], *self.block.channels[:-1]):
            pieces.append(self._view(memory, at, channels))
            at += channels
        return pieces[0], pieces[1 : 1 + self.block.depth], pieces[1 + self.block.depth :]


def uninitialized(like: Tensor, size: int) -> Tensor:
    """Memory of which every page costs a fault when it is first written."""
    memory = like.new_empty(size)
    ops.use_large_pages(memory)
    return memory


def forward(y: Tensor, block: Block, mean: Tensor, variance: Tensor, kept: bool) -> tuple[Tensor, list[Tensor]]:
    """x_d and the tape; mean and variance, (passes, channels of all codes), are filled in training."""
    memory = [uninitialized(y, size) for size in Tape.sizes(block, y.shape, kept)]
    tape = Tape(memory, block, y.shape)
    shape = (y.shape[0], block.channels[-1], *y.shape[2:])
    x = uninitialized(y, math.prod(shape)).view(shape)
    raw = tape.raw()
    raw[:, : block.first] = y
    x[:, : block.first] = y
    scales, parameters = block.scale.to(mean), block.parameters(mean)
    statistics = list(zip(block.split(mean[0]), block.split(variance[0]), strict=True))
    for i in range(1, 1 + block.depth):
        a, n = block.channels[i - 1 : i + 1]
        analysis(x[:, :a], block.filters[i - 1], block.dilations[i - 1], out=x[:, a:n])
        raw[:, a:n] = x[:, a:n]
        values = (scales[i - 1], *parameters[i - 1], *statistics[i - 1])
        ops.norm_relu_(x[:, :n], *values, block.training, block.eps)
    before = x
    for p in range(1, 1 + block.unfoldings):
        deepest = x
        if block.fista:
            weight = block.momentum[p - 1]
            deepest = torch.lerp(before, x, 1 + weight) if weight else x
            before = x.clone() if p < block.unfoldings else x
        _unfold(p, x, deepest, raw, tape, block, mean, variance)
    return x, memory if kept else []


def _unfold(p: int, x: Tensor, deepest: Tensor, raw: Tensor, tape: Tape, block: Block, mean, variance) -> None:
    """Pass p: the new x_d in the place of the old one."""
    z, u, e = tape.unfolding(p)
    codes = [*e, deepest]  # g_0 .. g_d
    for i in reversed(range(1, 1 + block.depth)):
        a, n = block.channels[i - 1 : i + 1]
        new = codes[i][:, a:n]
        z[:, a - block.first : n - block.first] = new
        add_synthesis(codes[i][:, :a], block.filters[i - 1], new, block.dilations[i - 1], out=codes[i - 1])
    e[0] -= raw[:, : block.first]
    scales, parameters = block.scale.to(mean), block.parameters(mean)
    statistics = list(zip(block.split(mean[p]), block.split(variance[p]), strict=True))
    for i in range(1, 1 + block.depth):
        a, n = block.channels[i - 1 : i + 1]
        analysis(e[i - 1], block.filters[i - 1], block.dilations[i - 1], out=u[i - 1][:, a:n])
        values = (scales[i - 1], *parameters[i - 1], *statistics[i - 1])
        # e_i takes the place of g_i.
        last = i == block.depth
        out = x if last else e[i]
        ops.unfold_norm_relu_(u[i - 1], codes[i], e[i - 1], *values, block.training, block.eps, out, not last)


class Gradients:
    """Of the parameters, collected over layers and passes."""

    def __init__(self, block: Block):
        self.filters = [torch.zeros_like(t, dtype=wide(t.dtype)) for t in block.filters]
        self.scale, self.bias, self.gamma, self.beta = (
            torch.zeros_like(t, dtype=wide(t.dtype)) for t in (block.scale, block.bias, block.gamma, block.beta)
        )
        self._of_norms = list(zip(*(block.split(t) for t in (self.gamma, self.beta, self.bias)), strict=True))

    def add_norm(self, i: int, *parts) -> None:
        """Layer i's, of gamma, beta and b."""
        for total, part in zip(self._of_norms[i - 1], parts, strict=True):
            total.add_(part)


def backward(
    grad: Tensor, memory: Sequence[Tensor], block: Block, shape: torch.Size, mean, variance
) -> tuple[Tensor, Gradients]:
    """The gradient of y, and those of the parameters."""
    tape, total = Tape(memory, block, shape), Gradients(block)
    grad = grad.clone(memory_format=torch.contiguous_format)
    grad_y = grad.new_zeros(shape)
    carried = None  # to the code before the last, by way of the momentum
    # Of g_i, from u_i and e_i, which are met in the order opposite to that in which g_i needs them.
    shares = _shares(grad, block) if block.unfoldings else []
    for p in reversed(range(1, 1 + block.unfoldings)):
        _unfold_backward(p, grad, grad_y, shares, tape, block, total, mean, variance)
        weight = block.momentum[p - 1] if block.fista else 0
        further = grad * -weight if weight else None
        if weight:
            grad.mul_(1 + weight)
        if carried is not None:
            grad.add_(carried)
        carried = further
    del shares
    _first_backward(grad, tape, block, total, mean, variance)
    return grad_y.add_(grad[:, : block.first]), total


def _shares(grad: Tensor, block: Block) -> list[Tensor]:
    """One for each of x_1 .. x_d."""
    shapes = [(grad.shape[0], n, *grad.shape[2:]) for n in block.channels[1:]]
    sizes = [math.prod(shape) for shape in shapes]
    pieces = uninitialized(grad, sum(sizes)).split(sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _unfold_backward(p: int, grad, grad_y, shares, tape: Tape, block: Block, total: Gradients, mean, variance) -> None:
    """From the gradient of x_d to that of g_d, in place."""
    z, u, e = tape.unfolding(p)
    scales, norms = block.scale.to(mean), block.norms(p, mean, variance)
    for i in reversed(range(1, 1 + block.depth)):
        a, n = block.channels[i - 1 : i + 1]
        scale, weight, dilation = scales[i - 1], block.filters[i - 1], block.dilations[i - 1]
        # e_i = g_i - x_i: what x_i gets, g_i loses. The last code is no part of an e.
        *of_norm, dot = norms[i - 1].gradient(
            grad[:, :n], u[i - 1], block.training, scale, a, e[i - 1], shares[i - 1], error=i < block.depth
        )
        total.add_norm(i, *of_norm)
        part = correlation(e[i - 1], grad[:, a:n], dilation)
        total.filters[i - 1].addcmul_(part, scale, value=-1)
        total.scale[i - 1] -= dot + torch.dot(weight.to(part).flatten(), part.flatten())
        add_synthesis(grad[:, :a], weight * scale.to(weight), grad[:, a:n], dilation, out=grad[:, :a])
    grad_y += grad[:, : block.first]
    torch.neg(grad[:, : block.first], out=grad[:, : block.first])
    for i in range(1, 1 + block.depth):
        a, n = block.channels[i - 1 : i + 1]
        dilation = block.dilations[i - 1]
        share, handed = shares[i - 1], grad[:, :a]
        analysis(handed, block.filters[i - 1], dilation, out=grad[:, a:n], base=share[:, a:])
        total.filters[i - 1] += correlation(handed, z[:, a - block.first : n - block.first], dilation)
        handed += share[:, :a]


def _first_backward(grad: Tensor, tape: Tape, block: Block, total: Gradients, mean, variance) -> None:
    """From the gradient of x_d to that of y, which is grad's first channels, in place."""
    raw = tape.raw()
    norms, scales = block.norms(0, mean, variance), block.scale.to(mean)
    chains = _chains(block, norms, mean)
    codes = uninitialized(raw, raw.numel()).view(raw.shape)
    for i in reversed(range(1, 1 + block.depth)):
        a, n = block.channels[i - 1 : i + 1]
        scale, weight, dilation = scales[i - 1], block.filters[i - 1], block.dilations[i - 1]
        x = codes[:, :n]
        A, B, low, high = (per_channel(t, x) for t in chains[i - 1])
        torch.addcmul(B, raw[:, :a], A, out=x[:, :a]).clamp_(low, high)
        x[:, a:] = raw[:, a:n]
        *of_norm, dot = norms[i - 1].gradient(grad[:, :n], x, block.training, scale, a)
        total.add_norm(i, *of_norm)
        part = correlation(x[:, :a], grad[:, a:n], dilation)
        total.filters[i - 1].addcmul_(part, scale)
        total.scale[i - 1] += dot
        add_synthesis(grad[:, :a], weight * scale.to(weight), grad[:, a:n], dilation, out=grad[:, :a])


def _chains(block: Block, norms: Sequence[Norm], mean: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(A, B, low, high) by channel, i = 0 .. d - 1: x_i = clamp(A x + B, low, high) of the channels as F made them."""
    A, B = mean.new_ones(block.first), mean.new_zeros(block.first)
    low, high = torch.full_like(A, -torch.inf), torch.full_like(A, torch.inf)
    chains = [(A, B, low, high)]
    for i in range(1, block.depth):
        norm, more = norms[i - 1], block.width
        A, B = (torch.cat([t, t.new_full((more,), fill)]) for t, fill in ((A, 1.0), (B, 0.0)))
        low, high = (torch.cat([t, t.new_full((more,), fill)]) for t, fill in ((low, -torch.inf), (high, torch.inf)))
        slope, shift = norm.gamma * norm.P, norm.gamma * norm.Q + norm.beta
        # 0 times infinity: a slope of zero makes one value of all.
        ends = [torch.where(slope == 0, shift, slope * end + shift) for end in (low, high)]
        A, B = slope * A, slope * B + shift
        low, high = torch.minimum(*ends).clamp(min=0), torch.maximum(*ends).clamp(min=0)
        chains.append((A, B, low, high))
    return chains
