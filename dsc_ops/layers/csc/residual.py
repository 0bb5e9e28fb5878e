"""Residual networks as convolutional sparse coding: a pair of layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsc_ops import _checks as check
from dsc_ops import reference

KINDS = ("res-csc", "simplified", "resnet", "plain")


class ResCSCBlock(nn.Module):
    """Two layers of which the second is a step of ISTA that starts from the block's input: Res-CSC, ResNet or neither.

    Args:
        in_channels: C of the input.
        code_channels: M of the result.
        stride: of the first layer.
        kind: what of the step is kept, see below.
        scale: c to start from.
        learn_threshold: whether batch norm's shift, which is minus the threshold of each channel, is learned.

    With A_i the analysis and S_i the synthesis of dictionary i (3x3, padding 1), BN_i batch norm and X' the input in
    the result's shape (every stride-th pixel, zeros for further channels),

        G = relu(BN_1(A_1 X)),   result = relu(BN_2(A_2 G + c A_2 S_2 X') + X')      "res-csc"
        without + X'  "simplified";   without c  "resnet";   without both  "plain"

    so "res-csc" with c = 0 is "resnet". c is about -1 / L, L being absorbed in A_2; it is learned. It is computed as
    A_2 (G + c S_2 X'): three convolutions, where the formula has four.

    Shape: X (N, C, H, W) to (N, M, H', W'). state_dict: dictionaries.0 (M, C, 3, 3) and .1 (M, M, 3, 3), norms.0 and
    .1 as of nn.BatchNorm2d, and scale (0-d, c) where the kind has it. Raises ``ValueError`` for another kind
    and for fewer code channels than input channels. Source: Zhang, Zhang (National Science Review, 2021), eq. 3 and 5;
    the shortcut without parameters is that of He et al. (2016) for CIFAR.

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
        learn_threshold: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "ResCSCBlock"
        self.in_channels = check.integer(name, "in_channels", in_channels, least=1)
        self.code_channels = check.integer(name, "code_channels", code_channels, least=1)
        self.stride = check.integer(name, "stride", stride, least=1)
        if kind not in KINDS:
            raise ValueError(f"{name}: kind is {kind!r}, it takes one of {', '.join(KINDS)}")
        if code_channels < in_channels and kind != "plain":
            raise ValueError(f"{name}: code_channels is {code_channels}, it takes at least in_channels = {in_channels}")
        self.kind = kind
        options = dict(device=device, dtype=dtype)
        self.dictionaries = nn.ParameterList(
            nn.Parameter(torch.empty(code_channels, channels, 3, 3, **options))
            for channels in (in_channels, code_channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(code_channels, **options) for _ in range(2))
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
        first, second = self.dictionaries
        g = self.norms[0](F.conv2d(x, first, None, self.stride, 1)).relu()
        x = x if self.kind == "plain" else self._shortcut(x)
        if self.scale is not None:
            g = torch.addcmul(g, reference.synthesis(x, second, x.shape[2:], padding=1), self.scale.to(g.dtype))
        u = self.norms[1](F.conv2d(g, second, None, 1, 1))
        return (u + x if self.kind in ("res-csc", "resnet") else u).relu()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.code_channels}, stride={self.stride}, kind={self.kind!r}"
