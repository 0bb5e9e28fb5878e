"""Residual networks as convolutional sparse coding: a pair of layers, on a CPU one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsc_ops import _checks as check
from dsc_ops import reference
from dsc_ops.layers.csc.convolutional import SOLVERS

ops = torch.ops.dsc_ops

CHANNELS = 16  # which those of the operator are a multiple of (csrc/cpu/residual.cpp)

KINDS = ("res-csc", "simplified", "resnet", "plain")


class ResCSCBlock(nn.Module):
    """Two layers of which the second is ISTA that starts from the block's input: Res-CSC, ResNet or neither.

    Args:
        in_channels: C of the input.
        code_channels: M of the result.
        stride: of the first layer.
        kind: what of the step is kept, see below.
        scale: c to start from.
        iterations: K steps of the second layer; the published block has one.
        solver: "ista", or "fista" for momentum between the steps.
        one_sided: codes x >= 0 (ReLU); else of both signs.
        learn_threshold: whether batch norm's shift, which is minus the threshold of each channel, is learned.

    With A_i the analysis and S_i the synthesis of dictionary i (3x3, padding 1), BN_i batch norm and X' the input in
    the result's shape (every stride-th pixel, zeros for further channels), the block is from x_0 = X' the last of

        G = T(BN_1(A_1 X)),   x_{k+1} = T(BN_{2+k}(A_2 G + c A_2 S_2 z_k) + z_k),   z_k = x_k      "res-csc"
        without + z_k  "simplified";   without c  "resnet";   without both  "plain"

    with "fista" z_k = x_k + (t_k - 1)/t_{k+1} (x_k - x_{k-1}), k > 0, t_1 = 1, t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2.
    Each step has a batch norm of its own, all have one c. T is ReLU, whose threshold is minus batch norm's shift beta;
    for codes of both signs T(u) = sign(u) max(|u| - theta, 0), theta = max(-beta, 0), of what batch norm makes without
    beta.

    So "res-csc" with c = 0 is "resnet". c is about -1 / L, L being absorbed in A_2; it is learned. It is computed as
    A_2 (G + c S_2 X'): three convolutions, where the formula has four.

    Shape: X (N, C, H, W) to (N, M, H', W'). state_dict: dictionaries.0 (M, C, 3, 3) and .1 (M, M, 3, 3), norms.0 to
    norms.K as of nn.BatchNorm2d, and scale (0-d, c) where the kind has it. Raises ``ValueError`` for another kind or
    solver, for fewer code channels than input channels, and for "plain" with more than one step, which starts from
    nothing. Source: Zhang, Zhang (National Science Review, 2021), eq. 3 and 5; the shortcut without parameters is that
    of He et al. (2016) for CIFAR.

    Equivalent to ``dsc_ops.layers.csc.reference.res_csc``. On a CPU, in float32 and float64, the published block of
    either kind with c is one operator where it has stride 1 and as many channels before as after, a multiple of 16.
    The result then has channels last in memory, and there is no second derivative.

    >>> ResCSCBlock(8, 16, stride=2)(torch.randn(2, 8, 6, 6)).shape
    torch.Size([2, 16, 3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        code_channels: int,
        stride: int = 1,
        *,
        kind: str = "res-csc",
        scale: float = -0.1,
        iterations: int = 1,
        solver: str = "ista",
        one_sided: bool = True,
        learn_threshold: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "ResCSCBlock"
        self.in_channels = check.integer(name, "in_channels", in_channels, least=1)
        self.code_channels = check.integer(name, "code_channels", code_channels, least=1)
        self.stride = check.integer(name, "stride", stride, least=1)
        self.iterations = check.integer(name, "iterations", iterations, least=1)
        if kind not in KINDS:
            raise ValueError(f"{name}: kind is {kind!r}, it takes one of {', '.join(KINDS)}")
        if solver not in SOLVERS:
            raise ValueError(f"{name}: solver is {solver!r}, it takes one of {', '.join(SOLVERS)}")
        if code_channels < in_channels and kind != "plain":
            raise ValueError(f"{name}: code_channels is {code_channels}, it takes at least in_channels = {in_channels}")
        if iterations > 1 and kind == "plain":
            raise ValueError(f"{name}: iterations is {iterations}, kind 'plain' takes 1")
        self.kind, self.solver, self.one_sided = kind, solver, bool(one_sided)
        options = dict(device=device, dtype=dtype)
        self.dictionaries = nn.ParameterList(
            nn.Parameter(torch.empty(code_channels, channels, 3, 3, **options))
            for channels in (in_channels, code_channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(code_channels, **options) for _ in range(1 + iterations))
        for norm in self.norms:
            norm.bias.requires_grad_(bool(learn_threshold))
        self._scale = check.number(name, "scale", scale)
        self.scale = nn.Parameter(torch.empty((), **options)) if kind in ("res-csc", "simplified") else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """ResNet's start, kaiming-normal filters and batch norm as it is when new, and c as given to the block."""
        for dictionary in self.dictionaries:
            nn.init.kaiming_normal_(dictionary, mode="fan_out", nonlinearity="relu")
        for norm in self.norms:
            norm.reset_parameters()
        if self.scale is not None:
            nn.init.constant_(self.scale, self._scale)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        more = self.code_channels - self.in_channels
        return F.pad(x, (0, 0, 0, 0, 0, more)) if more else x

    def forward(self, x: Tensor) -> Tensor:
        x = check.tensor("ResCSCBlock", "x", x)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"ResCSCBlock: x has shape {tuple(x.shape)}, it takes (N, {self.in_channels}, H, W)")
        if self._is_one_operator(x):
            return self._one_operator(x)
        first, second = self.dictionaries
        g = self._threshold(self.norms[0], F.conv2d(x, first, None, self.stride, 1))
        x = before = x if self.kind == "plain" else self._shortcut(x)
        momentum = "fista" if self.solver == "fista" else None
        weights = reference.momentum_weights(momentum, self.iterations) or [0.0] * self.iterations
        for weight, norm in zip(weights, self.norms[1:], strict=True):
            z, before = x + weight * (x - before) if weight else x, x
            r = g
            if self.scale is not None:
                r = torch.addcmul(g, reference.synthesis(z, second, z.shape[2:], padding=1), self.scale.to(g.dtype))
            u = F.conv2d(r, second, None, 1, 1)
            x = self._threshold(norm, u, z if self.kind in ("res-csc", "resnet") else None)
        return x

    def _threshold(self, norm: nn.BatchNorm2d, u: Tensor, z: Tensor | None = None) -> Tensor:
        """T(norm(u) + z)."""
        u = norm(u) if z is None else norm(u) + z
        if self.one_sided:
            return u.relu()
        beta = norm.bias.to(u.dtype)
        return ops.soft_threshold(u, (-beta).clamp(min=0), -beta, None, False)

    def _is_one_operator(self, x: Tensor) -> bool:
        """Whether ops.res_csc serves. It has no batch norms but those that a new block has."""
        first, second = self.norms[0], self.norms[-1]
        return (
            self.scale is not None
            and self.one_sided
            and self.iterations == self.stride == 1
            and self.in_channels == self.code_channels
            and self.code_channels % CHANNELS == 0
            and x.device.type == "cpu"
            and x.dtype == self.scale.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and all(type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats for norm in self.norms)
            and first.training == second.training
            and x.numel() > (x.shape[1] if first.training else 0)
        )

    def _one_operator(self, x: Tensor) -> Tensor:
        first, second = self.norms
        values = (value for norm in self.norms for value in (norm.weight, norm.bias))
        running = (value for norm in self.norms for value in (norm.running_mean, norm.running_var))
        codes, *_, statistics = ops.res_csc(
            x, *self.dictionaries, self.scale, *values, *running, first.training, first.eps, second.eps,
            self.kind == "res-csc",
        )  # fmt: skip
        if first.training:
            mean_1, variance_1, mean_2, variance_2 = statistics.unbind()
            count = x.numel() // x.shape[1]
            _follow(first, mean_1, variance_1, count)
            _follow(second, mean_2, variance_2, count)
        return codes

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.code_channels}, stride={self.stride}, kind={self.kind!r}, "
            f"iterations={self.iterations}, solver={self.solver!r}, one_sided={self.one_sided}"
        )


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics, as nn.BatchNorm2d keeps them: the variance is the unbiased one."""
    norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), momentum)
