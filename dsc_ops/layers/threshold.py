"""Thresholds as layers, alone and fused with a convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dsc_ops import _calls as calls
from dsc_ops import _checks as check
from dsc_ops import functional, reference
from dsc_ops.layers.state import WholeState


class SoftThreshold(nn.Module):
    """Soft threshold with one learnable theta per channel: T(u), or T_rho(u) for another ``activation``.

    Args:
        code_channels: M.
        theta: initial threshold of every channel.
        one_sided: T+(u) = max(u - theta, 0) in place of T.
        activation: rho of :func:`dsc_ops.functional.shrink`; "relu" is the soft threshold.

    Shape: u (N, M, *) to the same. state_dict: theta (M,). Source: Li, Feng, Zhou, sections 2 and 5.4.

    >>> SoftThreshold(2, theta=1.0)(torch.tensor([[3.0, 0.5]])).detach()
    tensor([[2., 0.]])
    """

    def __init__(
        self,
        code_channels: int,
        theta: float = 0.1,
        *,
        one_sided: bool = False,
        activation: str = "relu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.code_channels = check.integer("SoftThreshold", "code_channels", code_channels, least=1)
        if activation not in reference.ACTIVATIONS:
            takes = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"SoftThreshold: activation is {activation!r}, it takes one of {takes}")
        self.one_sided, self.activation = bool(one_sided), activation
        self._theta = check.number("SoftThreshold", "theta", theta)
        self.theta = nn.Parameter(torch.empty(self.code_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """theta as given to the layer."""
        nn.init.constant_(self.theta, self._theta)

    def forward(self, u: Tensor) -> Tensor:
        if self.activation == "relu":
            return functional.soft_threshold(u, self.theta, one_sided=self.one_sided)
        return functional.shrink(u, self.theta, activation=self.activation, one_sided=self.one_sided)

    def extra_repr(self) -> str:
        return f"{self.code_channels}, one_sided={self.one_sided}, activation={self.activation!r}"


class _ConvSoftThreshold(WholeState):
    """See :class:`ConvSoftThreshold`."""

    dims: int
    conv_type: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        code_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        theta: float = 0.1,
        one_sided: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = type(self).__name__
        shape = weight_shape(name, self.dims, in_channels, code_channels, kernel_size, groups)
        self.in_channels, self.code_channels, self.groups = in_channels, code_channels, groups
        self.kernel_size = shape[2:]
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(code_channels, device=device, dtype=dtype)) if bias else None
        conv = check.geometry(name, "weight", self.weight, stride, padding, dilation, groups)
        self.stride, self.padding, self.dilation = tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation)
        self.one_sided, self._theta = bool(one_sided), check.number(name, "theta", theta)
        self.theta = nn.Parameter(torch.empty(code_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start of nn.Conv2d for weight and bias; theta as given to the layer."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.constant_(self.theta, self._theta)

    @classmethod
    def from_conv(cls, conv: nn.Module, theta: float = 0.0, *, one_sided: bool = False) -> Self:
        """A layer with a copy of the weight and bias of an existing convolution.

        With the default theta = 0 and ``one_sided`` it computes the convolution followed by ReLU.
        """
        if not isinstance(conv, cls.conv_type):
            raise TypeError(f"{cls.__name__}.from_conv: conv must be an nn.{cls.conv_type.__name__}, got {type(conv)}")
        if conv.padding_mode != "zeros":
            raise ValueError(f'{cls.__name__}.from_conv: conv has padding_mode {conv.padding_mode!r}, it takes "zeros"')
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            0 if conv.padding == "valid" else conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            theta=theta,
            one_sided=one_sided,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(conv.weight)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    def forward(self, y: Tensor) -> Tensor:
        weight = self.weight
        conv = check.layer_signal(self, y, "weight", weight)
        return calls.conv_soft_threshold(y, weight, self.bias, self.theta, conv, self.one_sided)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.code_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"one_sided={self.one_sided}"
        )


class ConvSoftThreshold(_ConvSoftThreshold):
    """Convolution and soft threshold in one pass: T(conv(y, weight) + bias), one learnable theta per atom.

    Args:
        in_channels, code_channels, kernel_size, stride, padding, dilation, groups, bias: as in nn.Conv2d (zero
            padding), code_channels being its out_channels.
        theta: initial threshold of every atom.
        one_sided: max(u - theta, 0) in place of T; with theta = 0 that is the convolution followed by ReLU.

    Shape: y (N, C, H, W) to codes (N, M, H', W'). state_dict: weight (M, C/groups, kh, kw), bias (M,), theta (M,).
    Equivalent to ``soft_threshold(nn.Conv2d(...)(y), theta)``. Source: Li, Feng, Zhou, section 2.

    >>> ConvSoftThreshold(3, 8, 3, padding=1)(torch.zeros(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    dims, conv_type = 2, nn.Conv2d


class ConvSoftThreshold1d(_ConvSoftThreshold):
    """:class:`ConvSoftThreshold` for signals (N, C, length); arguments as there.

    >>> ConvSoftThreshold1d(1, 8, 5, padding="same")(torch.zeros(2, 1, 16)).shape
    torch.Size([2, 8, 16])
    """

    dims, conv_type = 1, nn.Conv1d


def weight_shape(name: str, dims: int, in_channels, code_channels, kernel_size, groups) -> tuple[int, ...]:
    """(M, C/groups, *kernel) of a layer, from its checked arguments."""
    check.integer(name, "in_channels", in_channels, least=1)
    check.integer(name, "code_channels", code_channels, least=1)
    check.integer(name, "groups", groups, least=1)
    for argument, value in (("in_channels", in_channels), ("code_channels", code_channels)):
        if value % groups != 0:
            raise ValueError(f"{name}: groups is {groups}, it has to divide {argument} = {value}")
    return code_channels, in_channels // groups, *check.integers(name, "kernel_size", kernel_size, dims, least=1)
