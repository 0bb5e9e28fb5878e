"""The MSD-CSC block as one operator: forward and backward on buffers that nothing is concatenated to.

Layer i has the dictionary D_i = [I, F_i^T] on codes of C_i = C_0 + i w channels, so D_i^T x = [x; F_i x], and channels
C_{i-1} .. C_i of a buffer (N, C_d, H, W) are what F_i made. With T_i(u) = relu(BN_i(u)):

    pass 0     x_i = T_i(c_i [x_{i-1}; F_i x_{i-1}] + b_i)                                      i = 1 .. d, x_0 = y
    pass p     down  g_{i-1} = D_i g_i = g_i[:C_{i-1}] + F_i^T g_i[C_{i-1}:]                    i = d .. 1, g_d = x_d
               up    e_{i-1} = g_{i-1} - x_{i-1},  x_i = T_i(g_i - c_i [e_{i-1}; F_i e_{i-1}] + b_i)

Pass 0 changes a channel that is handed on by a per-channel map alone, relu(A x + B). A chain of such maps is one
clamp(A x + B, low, high), so the tape holds each channel once, as F made it, and backward makes x_i of it for any i.
Down, g_{i-1} is g_i with something added to its first channels: one buffer, in place, that ends with the channels that
each F_i^T was applied to. Up, the tape holds u_i = g_i - c_i [e; F e] and e_{i-1}, of which batch norm and convolution
have gradients. F x is a product of matrices for each sample, taps x channels by channels x pixels, on a slice of
channels as it lies; its nine rows of w channels are shifted and added. F^T and the gradient of F shift the w channels
they have, never C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_ops import reference

ops = torch.ops.dsc_ops

KERNEL = 3
TAPS = KERNEL * KERNEL
# Values of the shifted channels at a time: on a CPU they are to stay in the cache, on a GPU to fill it.
CHUNK = {"cpu": 2**19}
LARGE_CHUNK = 2**26


# --- F x, F^T z and the gradient of F, on slices of channels ----------------------------------------------------------


def taps_of(weight: Tensor) -> Tensor:
    """(w, C, 3, 3) as a matrix (9 w, C)."""
    return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])


def weight_of(taps: Tensor, width: int) -> Tensor:
    return taps.view(KERNEL, KERNEL, width, -1).permute(2, 3, 0, 1).contiguous()


def _chunks(x: Tensor, width: int) -> Iterator[slice]:
    """Samples that are worked on together."""
    each = TAPS * width * x.shape[2] * x.shape[3]
    count = max(1, CHUNK.get(x.device.type, LARGE_CHUNK) // max(each, 1))
    return (slice(first, first + count) for first in range(0, x.shape[0], count))


def analysis(x: Tensor, taps: Tensor, dilation: int, out: Tensor) -> None:
    """out = F x."""
    for part in _chunks(x, out.shape[1]):
        rows = x[part]
        products = torch.bmm(taps.expand(rows.shape[0], -1, -1), rows.flatten(2))
        out[part] = ops.sum_of_shifts(products.unflatten(2, x.shape[2:]), dilation)


def add_synthesis(x: Tensor, taps: Tensor, z: Tensor, dilation: int, given: Tensor | None = None) -> Tensor | None:
    """x += F^T z, in place; and corr(given, z), the gradient of F where z is that of F given."""
    gradient = None
    for part in _chunks(x, z.shape[1]):
        # F^T z is F^T times the shifts of z, pixel by pixel.
        shifts = ops.shifts(z[part], dilation).flatten(2)
        x[part].flatten(2).baddbmm_(taps.t().expand(shifts.shape[0], -1, -1), shifts)
        if given is not None:
            products = torch.bmm(shifts, given[part].flatten(2).transpose(1, 2)).sum(0)
            gradient = products if gradient is None else gradient.add_(products)
    return gradient


def correlation(x: Tensor, z: Tensor, dilation: int) -> Tensor:
    """corr(x, z), (9 w, C): the gradient of F where z is that of F x, or x that of F^T z."""
    gradient = x.new_zeros(TAPS * z.shape[1], x.shape[1])
    for part in _chunks(x, z.shape[1]):
        shifts = ops.shifts(z[part], dilation).flatten(2)
        gradient += torch.bmm(shifts, x[part].flatten(2).transpose(1, 2)).sum(0)
    return gradient


# --- batch norm and ReLU ----------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums over values of this type are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, 1, 1)


def dot(x: Tensor, z: Tensor) -> Tensor:
    """The sum of x z, of slices of channels as they lie."""
    rows, columns = (t.flatten(1).to(wide(t.dtype)) for t in (x, z))
    return torch.bmm(rows.unsqueeze(1), columns.unsqueeze(2)).sum()


@dataclass
class Norm:
    """Batch norm of u = scale x + b as a map of x: xhat = P x + Q, then gamma xhat + beta."""

    inverse: Tensor  # 1 / standard deviation of u
    P: Tensor
    Q: Tensor
    gamma: Tensor
    beta: Tensor

    @classmethod
    def of(cls, scale, bias: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Norm:
        inverse = torch.rsqrt(variance + eps)
        return cls(inverse, scale * inverse, (bias - mean) * inverse, gamma.to(mean), beta.to(mean))

    def apply(self, x: Tensor, out: Tensor) -> None:
        """out = relu(gamma xhat + beta); out may be x."""
        shift = self.gamma * self.Q + self.beta
        torch.addcmul(per_channel(shift, x), x, per_channel(self.gamma * self.P, x), out=out)
        out.relu_()

    def gradient(self, grad: Tensor, x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of u, gamma, beta and b, from that of the result."""
        values = (self.P, self.Q, self.gamma, self.beta, self.inverse)
        grad_u, grad_gamma, grad_beta = ops.norm_relu_backward(grad, x, *values, training)
        # In training the mean takes b away: its gradient is zero.
        return grad_u, grad_gamma, grad_beta, 0 if training else self.gamma * self.inverse * grad_beta


# --- the block --------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """The arguments, and where everything lies on the tape."""

    taps: list[Tensor]
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
        self.depth = len(self.taps)
        self.channels = [self.first + i * self.width for i in range(self.depth + 1)]
        self.starts = [sum(self.channels[1:i]) for i in range(1, self.depth + 2)]
        self.momentum = reference.momentum_weights("fista" if self.fista else None, 1 + self.unfoldings)[1:]

    def of(self, flat: Tensor, i: int) -> Tensor:
        """Layer i's part, i = 1 .. d, of one value for each channel of each code."""
        return flat[..., self.starts[i - 1] : self.starts[i]]

    def norm(self, p: int, i: int, mean: Tensor, variance: Tensor) -> Norm:
        scale = self.scale[i - 1].to(mean) if p == 0 else 1
        bias = self.of(self.bias, i).to(mean)
        statistics = (self.of(mean[p], i), self.of(variance[p], i))
        return Norm.of(scale, bias, *statistics, self.of(self.gamma, i), self.of(self.beta, i), self.eps)

    @property
    def pass_channels(self) -> int:
        """What an unfolding keeps: g_d at its end, u_1 .. u_d, e_0 .. e_{d-1}."""
        return self.channels[-1] + sum(self.channels[1:]) + sum(self.channels[:-1])


class Tape:
    """Views of one piece of memory: the channels of pass 0, then g, u_i and e_i of each unfolding."""

    def __init__(self, memory: Tensor, block: Block, shape: torch.Size, kept: bool):
        self.memory, self.block, self.kept = memory, block, kept
        self.batch, _, self.height, self.length = shape
        self.pixels = self.batch * self.height * self.length

    @staticmethod
    def size(block: Block, shape: torch.Size, kept: bool) -> int:
        passes = block.unfoldings if kept else min(block.unfoldings, 1)
        pixels = shape[0] * shape[2] * shape[3]
        return pixels * (block.channels[-1] + passes * block.pass_channels)

    def _view(self, first: int, channels: int) -> Tensor:
        piece = self.memory[first * self.pixels : (first + channels) * self.pixels]
        return piece.view(self.batch, channels, self.height, self.length)

    def raw(self) -> Tensor:
        return self._view(0, self.block.channels[-1])

    def unfolding(self, p: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """g, [u_1 .. u_d], [e_0 .. e_{d-1}] of unfolding p = 1, 2, ..."""
        at = self.block.channels[-1] + (p - 1 if self.kept else 0) * self.block.pass_channels
        pieces = []
        for channels in (self.block.channels[-1], *self.block.channels[1:], *self.block.channels[:-1]):
            pieces.append(self._view(at, channels))
            at += channels
        return pieces[0], pieces[1 : 1 + self.block.depth], pieces[1 + self.block.depth :]


def forward(y: Tensor, block: Block, mean: Tensor, variance: Tensor, kept: bool) -> tuple[Tensor, Tensor]:
    """x_d and the tape; mean and variance, (passes, channels of all codes), are filled in training."""
    tape = Tape(y.new_empty(Tape.size(block, y.shape, kept)), block, y.shape, kept)
    x = y.new_empty(y.shape[0], block.channels[-1], *y.shape[2:])
    raw = tape.raw()
    raw[:, : block.first] = y
    x[:, : block.first] = y
    for i, (a, n) in enumerate(zip(block.channels, block.channels[1:], strict=False), 1):
        analysis(x[:, :a], block.taps[i - 1], block.dilations[i - 1], out=x[:, a:n])
        raw[:, a:n] = x[:, a:n]
        if block.training:
            scale, (m, v) = block.scale[i - 1].to(mean), ops.moments(x[:, :n])
            block.of(mean[0], i).copy_(scale * m + block.of(block.bias, i))
            block.of(variance[0], i).copy_(scale.square() * v)
        block.norm(0, i, mean, variance).apply(x[:, :n], out=x[:, :n])
    before = x
    for p in range(1, 1 + block.unfoldings):
        deepest = x
        if block.fista:
            weight = block.momentum[p - 1]
            deepest = torch.lerp(before, x, 1 + weight) if weight else x
            before = x.clone() if p < block.unfoldings else x
        _unfold(p, x, deepest, raw, tape, block, mean, variance)
    return x, tape.memory if kept else y.new_empty(0)


def _unfold(p: int, x: Tensor, deepest: Tensor, raw: Tensor, tape: Tape, block: Block, mean, variance) -> None:
    """Pass p: the new x_d in the place of the old one."""
    g, u, e = tape.unfolding(p)
    g.copy_(deepest)
    for i in reversed(range(1, 1 + block.depth)):
        a, n = block.channels[i - 1 : i + 1]
        u[i - 1].copy_(g[:, :n])
        add_synthesis(g[:, :a], block.taps[i - 1], g[:, a:n], block.dilations[i - 1])
        e[i - 1].copy_(g[:, :a])
    x[:, : block.first] = raw[:, : block.first]
    features = x.new_empty(x.shape[0], block.width, *x.shape[2:])
    for i in range(1, 1 + block.depth):
        a, n = block.channels[i - 1 : i + 1]
        error, code, scale = e[i - 1], u[i - 1], block.scale[i - 1].to(x.dtype)
        error -= x[:, :a]
        analysis(error, block.taps[i - 1], block.dilations[i - 1], out=features)
        code[:, :a].addcmul_(error, scale, value=-1)
        code[:, a:].addcmul_(features, scale, value=-1)
        if block.training:
            m, v = ops.moments(code)
            block.of(mean[p], i).copy_(m + block.of(block.bias, i))
            block.of(variance[p], i).copy_(v)
        block.norm(p, i, mean, variance).apply(code, out=x[:, :n])


class Gradients:
    """Of the parameters, collected over layers and passes."""

    def __init__(self, block: Block):
        self.taps = [torch.zeros_like(t) for t in block.taps]
        self.scale, self.bias, self.gamma, self.beta = (
            torch.zeros_like(t, dtype=wide(t.dtype)) for t in (block.scale, block.bias, block.gamma, block.beta)
        )

    def add_norm(self, block: Block, i: int, gamma: Tensor, beta: Tensor, bias) -> None:
        for total, part in ((self.gamma, gamma), (self.beta, beta), (self.bias, bias)):
            block.of(total, i).add_(part)


def backward(grad: Tensor, memory: Tensor, block: Block, shape: torch.Size, mean, variance) -> tuple[Tensor, Gradients]:
    """The gradient of y, and those of the parameters."""
    tape, total = Tape(memory, block, shape, kept=True), Gradients(block)
    grad = grad.clone(memory_format=torch.contiguous_format)
    grad_y = grad.new_zeros(shape)
    carried = None  # to the code before the last, by way of the momentum
    # Of g_i, from u_i and e_i, which are met in the order opposite to that in which g_i needs them.
    codes = block.channels[1:] if block.unfoldings else []
    shares = [grad.new_empty(shape[0], n, *shape[2:]) for n in codes]
    for p in reversed(range(1, 1 + block.unfoldings)):
        _unfold_backward(p, grad, grad_y, shares, tape, block, total, mean, variance)
        weight = block.momentum[p - 1] if block.fista else 0
        further = grad * -weight if weight else None
        grad.mul_(1 + weight)
        if carried is not None:
            grad.add_(carried)
        carried = further
    del shares
    _first_backward(grad, tape, block, total, mean, variance)
    return grad_y.add_(grad[:, : block.first]), total


def _unfold_backward(p: int, grad, grad_y, shares, tape: Tape, block: Block, total: Gradients, mean, variance) -> None:
    """From the gradient of x_d to that of g_d, in place."""
    g, u, e = tape.unfolding(p)
    for i in reversed(range(1, 1 + block.depth)):
        a, n = block.channels[i - 1 : i + 1]
        scale, dilation = block.scale[i - 1], block.dilations[i - 1]
        norm = block.norm(p, i, mean, variance)
        grad_u, *of_norm = norm.gradient(grad[:, :n], u[i - 1], block.training)
        total.add_norm(block, i, *of_norm)
        # e_i = g_i - x_i: what x_i gets, g_i loses. The last code is no part of an e.
        torch.sub(grad_u, grad[:, :n], out=shares[i - 1]) if i < block.depth else shares[i - 1].copy_(grad_u)
        torch.mul(grad_u[:, :a], scale.to(grad.dtype), out=grad[:, :a])
        taps = block.taps[i - 1]
        part = add_synthesis(grad[:, :a], taps * scale.to(taps), grad_u[:, a:], dilation, given=e[i - 1])
        total.taps[i - 1].sub_(part * scale.to(part))
        total.scale[i - 1] -= dot(grad_u[:, :a], e[i - 1]) + (taps * part).sum()
    grad_y += grad[:, : block.first]
    torch.neg(grad[:, : block.first], out=grad[:, : block.first])
    for i in range(1, 1 + block.depth):
        a, n = block.channels[i - 1 : i + 1]
        dilation = block.dilations[i - 1]
        analysis(grad[:, :a], block.taps[i - 1], dilation, out=grad[:, a:n])
        total.taps[i - 1] += correlation(grad[:, :a], g[:, a:n], dilation)
        grad[:, :n] += shares[i - 1]


def _first_backward(grad: Tensor, tape: Tape, block: Block, total: Gradients, mean, variance) -> None:
    """From the gradient of x_d to that of y, which is grad's first channels, in place."""
    raw = tape.raw()
    chains = _chains(block, mean, variance)
    for i in reversed(range(1, 1 + block.depth)):
        a, n = block.channels[i - 1 : i + 1]
        scale, dilation = block.scale[i - 1], block.dilations[i - 1]
        x = raw[:, :n].clone()
        A, B, low, high = (per_channel(t, x) for t in chains[i - 1])
        torch.addcmul(B, x[:, :a], A, out=x[:, :a])
        torch.clamp(x[:, :a], low, high, out=x[:, :a])
        grad_u, *of_norm = block.norm(0, i, mean, variance).gradient(grad[:, :n], x, block.training)
        total.add_norm(block, i, *of_norm)
        total.scale[i - 1] += dot(grad_u, x)
        torch.mul(grad_u[:, :a], scale.to(grad.dtype), out=grad[:, :a])
        taps = block.taps[i - 1]
        part = add_synthesis(grad[:, :a], taps * scale.to(taps), grad_u[:, a:], dilation, given=x[:, :a])
        total.taps[i - 1].add_(part * scale.to(part))


def _chains(block: Block, mean: Tensor, variance: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(A, B, low, high) by channel, i = 0 .. d - 1: x_i = clamp(A x + B, low, high) of the channels as F made them."""
    A, B = mean.new_ones(block.first), mean.new_zeros(block.first)
    low, high = torch.full_like(A, -torch.inf), torch.full_like(A, torch.inf)
    chains = [(A, B, low, high)]
    for i in range(1, block.depth):
        norm, more = block.norm(0, i, mean, variance), block.width
        A, B = (torch.cat([t, t.new_full((more,), fill)]) for t, fill in ((A, 1.0), (B, 0.0)))
        low, high = (torch.cat([t, t.new_full((more,), fill)]) for t, fill in ((low, -torch.inf), (high, torch.inf)))
        slope, shift = norm.gamma * norm.P, norm.gamma * norm.Q + norm.beta
        # 0 times infinity: a slope of zero makes one value of all.
        ends = [torch.where(slope == 0, shift, slope * end + shift) for end in (low, high)]
        A, B = slope * A, slope * B + shift
        low, high = torch.minimum(*ends).clamp(min=0), torch.maximum(*ends).clamp(min=0)
        chains.append((A, B, low, high))
    return chains
