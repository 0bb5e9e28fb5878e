"""The mixed-scale dense network as convolutional sparse coding: one block, one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsc_ops import _checks as check
from dsc_ops import reference
from dsc_ops.layers.csc import _dilated
from dsc_ops.layers.csc.convolutional import SOLVERS

ops = torch.ops.dsc_ops

ARGUMENTS = (
    "Tensor y, Tensor[] filters, Tensor scale, Tensor bias, Tensor gamma, Tensor beta, Tensor mean, Tensor variance, "
    "int[] dilations, int unfoldings, bool fista, bool training, float eps"
)


def _block(filters, scale, bias, gamma, beta, dilations, unfoldings, fista, training, eps) -> _dilated.Block:
    filters = [f.contiguous() for f in filters]
    width, first = filters[0].shape[:2]
    return _dilated.Block(
        filters, scale, bias, gamma, beta, dilations, unfoldings, fista, training, eps, width=width, first=first
    )


@torch.library.custom_op(
    "dsc_ops::msd_csc",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool keep_tape) -> (Tensor codes, Tensor[] tape, Tensor mean, Tensor variance)",
)
def _msd_csc(
    y, filters, scale, bias, gamma, beta, mean, variance, dilations, unfoldings, fista, training, eps, keep_tape
):
    block = _block(filters, scale, bias, gamma, beta, dilations, unfoldings, fista, training, eps)
    mean, variance = mean.clone(), variance.clone()
    codes, tape = _dilated.forward(y, block, mean, variance, keep_tape)
    return codes, tape, mean, variance


@_msd_csc.register_fake
def _(y, filters, scale, bias, gamma, beta, mean, variance, dilations, unfoldings, fista, training, eps, keep_tape):
    block = _block(filters, scale, bias, gamma, beta, dilations, unfoldings, fista, training, eps)
    sizes = _dilated.Tape.sizes(block, y.shape, kept=True) if keep_tape else []
    codes = y.new_empty(y.shape[0], block.channels[-1], *y.shape[2:])
    return codes, [y.new_empty(size) for size in sizes], torch.empty_like(mean), torch.empty_like(variance)


@torch.library.custom_op(
    "dsc_ops::msd_csc_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] tape, {ARGUMENTS}) -> (Tensor grad_y, Tensor[] grad_filters, Tensor grad_scale, "
    "Tensor grad_bias, Tensor grad_gamma, Tensor grad_beta)",
)
def _msd_csc_backward(
    grad, tape, y, filters, scale, bias, gamma, beta, mean, variance, dilations, unfoldings, fista, training, eps
):
    block = _block(filters, scale, bias, gamma, beta, dilations, unfoldings, fista, training, eps)
    grad_y, total = _dilated.backward(grad, tape, block, y.shape, mean, variance)
    grad_filters = [g.to(f.dtype) for g, f in zip(total.filters, filters, strict=True)]
    others = [
        g.to(t.dtype)
        for g, t in zip((total.scale, total.bias, total.gamma, total.beta), (scale, bias, gamma, beta), strict=True)
    ]
    return grad_y, grad_filters, *others


@_msd_csc_backward.register_fake
def _(grad, tape, y, filters, scale, bias, gamma, beta, mean, variance, dilations, unfoldings, fista, training, eps):
    grad_y = y.new_empty(y.shape)
    grad_filters = [f.new_empty(f.shape) for f in filters]
    return grad_y, grad_filters, *(torch.empty_like(t) for t in (scale, bias, gamma, beta))


def _setup(ctx, inputs, output) -> None:
    y, filters, scale, bias, gamma, beta, _, _, *ctx.rest, _ = inputs
    _, tape, mean, variance = output
    ctx.set_materialize_grads(False)  # of the tape: zeros of its size
    ctx.mark_non_differentiable(*tape, mean, variance)
    ctx.pieces = len(tape)
    ctx.save_for_backward(*tape, mean, variance, y, scale, bias, gamma, beta, *filters)


def _gradients(ctx, grad, *_):
    if grad is None:
        return None, [None] * len(ctx.saved_tensors[ctx.pieces + 7 :]), *[None] * 12
    tape, tensors = ctx.saved_tensors[: ctx.pieces], ctx.saved_tensors[ctx.pieces :]
    mean, variance, y, scale, bias, gamma, beta, *filters = tensors
    gradients = ops.msd_csc_backward(grad, tape, y, filters, scale, bias, gamma, beta, mean, variance, *ctx.rest)
    return *gradients, *[None] * 8


_msd_csc.register_autograd(_gradients, setup_context=_setup)


class _Layer(nn.Module):
    """What layer i learns, and the running statistics of its batch norm, one row for each pass."""

    def __init__(self, channels: int, width: int, passes: int, learn_threshold: bool, device, dtype):
        super().__init__()
        codes = channels + width
        self.dictionary = nn.Parameter(torch.empty(width, channels, 3, 3, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        for name in ("bias", "norm_weight", "norm_bias"):
            learned = learn_threshold or name == "norm_weight"
            setattr(self, name, nn.Parameter(torch.empty(codes, device=device, dtype=dtype), requires_grad=learned))
        self.register_buffer("running_mean", torch.empty(passes, codes, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.empty(passes, codes, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.dictionary, std=0.1 / math.sqrt(self.dictionary[0].numel()))
        for ones in (self.scale, self.norm_weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.norm_bias, self.running_mean):
            nn.init.zeros_(zeros)


class MSDCSCBlock(nn.Module):
    """A mixed-scale dense block whose codes are estimated once more, together: MSD-CSC, with batch norm inside.

    Args:
        width: w, channels that each layer adds.
        dilations: s_i of each layer; as many layers.
        unfoldings: further estimates after the forward pass; 0 is the dense network itself, MSDNet.
        solver: "ista", or "fista" for momentum on the deepest code between unfoldings.
        in_channels: C_0; None is ``width``.
        one_sided: codes x >= 0 (ReLU); else of both signs.
        learn_threshold: whether b and batch norm's shift, which are the thresholds, are learned.
        eps, momentum: of batch norm, as in nn.BatchNorm2d.

    Layer i has 3x3 filters F_i of dilation and padding s_i and the dictionary D_i = [I, F_i^T]. With x_0 = y,
    D_i^T x = [x; F_i x] and T_i(u) = relu(BN_i(u))::

        forward pass     x_i = T_i(c_i D_i^T x_{i-1} + b_i)
        an unfolding     g_d = x_d (with "fista": x_d + (t - 1)/t' (x_d - its value before)), g_{i-1} = D_i g_i, then
                         x_i = T_i(g_i - c_i (D_i^T D_i g_i - D_i^T x_{i-1}) + b_i)

    For codes of both signs T_i(u) = sign(v) max(|v| - theta, 0), theta = max(-beta, 0), where v is what batch norm
    makes of u without its shift beta. Those are composed of convolutions and concatenated.

    Shape: y (N, C_0, H, W) to x_d (N, C_0 + d w, H, W). state_dict, by layer: dictionary (w, C_{i-1}, 3, 3), scale
    (c_i), bias (b_i), norm_weight, norm_bias, running_mean, running_var. Training takes the statistics of the batch,
    evaluation the running ones, which have a row for each pass, since passes differ in scale. Raises ``ValueError``
    for another solver and, in training, for a batch of one value a channel.

    Else nothing is concatenated, D is never made, and there is no second derivative. A new block has weights from
    N(0, 0.01 / fan_in), c = 1 and b = 0. Equivalent to ``dsc_ops.layers.csc.reference.msd_csc``. Source: Zhang, Zhang
    (National Science Review, 2021).

    >>> block = MSDCSCBlock(8, [1, 2, 3], unfoldings=2)
    >>> block(torch.randn(2, 8, 6, 6)).shape
    torch.Size([2, 32, 6, 6])
    """

    def __init__(
        self,
        width: int,
        dilations: Sequence[int],
        unfoldings: int = 0,
        solver: str = "ista",
        *,
        in_channels: int | None = None,
        one_sided: bool = True,
        learn_threshold: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.width = check.integer("MSDCSCBlock", "width", width, least=1)
        in_channels = width if in_channels is None else in_channels
        self.in_channels = check.integer("MSDCSCBlock", "in_channels", in_channels, least=1)
        if not isinstance(dilations, Sequence) or isinstance(dilations, str) or not len(dilations):
            raise TypeError(f"MSDCSCBlock: dilations must be a sequence of at least one integer, got {dilations!r}")
        self.dilations = [check.integer("MSDCSCBlock", "dilations", s, least=1) for s in dilations]
        self.unfoldings = check.integer("MSDCSCBlock", "unfoldings", unfoldings, least=0)
        if solver not in SOLVERS:
            raise ValueError(f"MSDCSCBlock: solver is {solver!r}, it takes one of {', '.join(SOLVERS)}")
        self.solver, self.one_sided = solver, bool(one_sided)
        self.eps = check.number("MSDCSCBlock", "eps", eps, least=0)
        self.momentum = check.number("MSDCSCBlock", "momentum", momentum, least=0)
        self.layers = nn.ModuleList(
            _Layer(in_channels + i * width, width, 1 + unfoldings, bool(learn_threshold), device, dtype)
            for i in range(len(self.dilations))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start: weights from N(0, 0.01 / fan_in), c = 1, b = 0, batch norm as it is when new."""
        for layer in self.layers:
            layer.reset_parameters()

    def _all(self, name: str) -> Tensor:
        """One attribute of all layers, side by side."""
        return torch.cat([getattr(layer, name) for layer in self.layers], dim=-1)

    def forward(self, y: Tensor) -> Tensor:
        y = check.tensor("MSDCSCBlock", "y", y)
        if y.dim() != 4 or y.shape[1] != self.in_channels:
            raise ValueError(f"MSDCSCBlock: y has shape {tuple(y.shape)}, it takes (N, {self.in_channels}, H, W)")
        if self.training and y.numel() == y.shape[1]:
            raise ValueError(f"MSDCSCBlock: y has shape {tuple(y.shape)}, training takes more than one value a channel")
        filters = [layer.dictionary for layer in self.layers]
        # As a convolution under autocast; batch norm's sums are wide in any case.
        device = y.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else filters[0].dtype
        check.like("MSDCSCBlock", "y", y, "dictionary", filters[0])
        y, filters = y.to(dtype), [f.to(dtype) for f in filters]
        if not self.one_sided:
            return self._of_both_signs(y, filters)
        parameters = [
            torch.stack([layer.scale for layer in self.layers]),
            *(self._all(name) for name in ("bias", "norm_weight", "norm_bias")),
        ]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        statistics = [self._all(name).to(wide) for name in ("running_mean", "running_var")]
        keep_tape = torch.is_grad_enabled() and any(t.requires_grad for t in (y, *filters, *parameters))
        fista = self.solver == "fista"
        codes, _, mean, variance = ops.msd_csc(
            y, filters, *parameters, *statistics, self.dilations, self.unfoldings, fista, self.training, self.eps,
            keep_tape,
        )  # fmt: skip
        if self.training and y.shape[0]:
            self._follow(mean, variance, y.numel() // y.shape[1])
        return codes

    def _of_both_signs(self, y: Tensor, filters: Sequence[Tensor]) -> Tensor:
        """x_d, as it is written."""

        def up(x: Tensor, i: int) -> Tensor:
            s = self.dilations[i]
            return torch.cat([x, reference.analysis(x, filters[i], padding=s, dilation=s)], 1)

        def down(x: Tensor, i: int) -> Tensor:
            s, (image, new) = self.dilations[i], x.split([x.shape[1] - self.width, self.width], 1)
            return image + reference.synthesis(new, filters[i], x.shape[2:], padding=s, dilation=s)

        def threshold(u: Tensor, i: int, p: int) -> Tensor:
            layer, training = self.layers[i], self.training and y.shape[0] > 0
            u = F.batch_norm(
                u + _dilated.per_channel(layer.bias, u), layer.running_mean[p], layer.running_var[p], layer.norm_weight,
                None, training, self.momentum, self.eps,
            )  # fmt: skip
            return ops.soft_threshold(u, (-layer.norm_bias).clamp(min=0).to(u.dtype), None, None, False)

        depth = len(self.layers)
        scales, x = [layer.scale.to(y.dtype) for layer in self.layers], [y]
        for i in range(depth):
            x.append(threshold(scales[i] * up(x[i], i), i, 0))
        momentum = "fista" if self.solver == "fista" else None
        before = x[-1]
        weights = reference.momentum_weights(momentum, 1 + self.unfoldings)[1:] or [0.0] * self.unfoldings
        for p, weight in enumerate(weights, 1):
            g = [torch.lerp(before, x[-1], 1 + weight) if weight else x[-1]]
            before = x[-1]
            for i in reversed(range(depth)):
                g.insert(0, down(g[0], i))
            for i in range(depth):
                x[i + 1] = threshold(g[i + 1] - scales[i] * up(g[i] - x[i], i), i, p)
        return x[-1]

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """The running statistics, of which the variance is the unbiased one."""
        sizes = [layer.bias.shape[0] for layer in self.layers]
        variance = variance * (count / (count - 1))
        for layer, m, v in zip(self.layers, mean.split(sizes, 1), variance.split(sizes, 1), strict=True):
            layer.running_mean.lerp_(m.to(layer.running_mean.dtype), self.momentum)
            layer.running_var.lerp_(v.to(layer.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return (
            f"{self.width}, dilations={self.dilations}, unfoldings={self.unfoldings}, solver={self.solver!r}, "
            f"in_channels={self.in_channels}, one_sided={self.one_sided}"
        )
