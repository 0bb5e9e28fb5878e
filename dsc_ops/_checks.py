"""Argument checks of the public functions; a message names the function, the argument, what it got, what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SUPPORTED = frozenset(DTYPES)
_INTEGERS = (int, torch.SymInt)


class Geometry:
    """stride, padding, dilation (lists, one number per axis) and groups: the trailing arguments of each convolution
    operator, checked."""

    __slots__ = ("dilation", "groups", "padding", "stride")

    def __init__(self, stride: list[int], padding: list[int], dilation: list[int], groups: int):
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        return self.stride, self.padding, self.dilation, self.groups


def tensor(function: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _SUPPORTED:
        raise TypeError(f"{function}: {name} has dtype {value.dtype}, it takes float32, float64, bfloat16 or float16")
    return value


def like(function: str, name: str, value: object, model_name: str, model: Tensor) -> Tensor:
    """A tensor that has to share dtype and device with another. Autocast makes dtypes equal inside the operator."""
    value = tensor(function, name, value)
    if value.device != model.device:
        raise ValueError(f"{function}: {name} is on {value.device}, {model_name} on {model.device}")
    if value.dtype != model.dtype and not torch.is_autocast_enabled(model.device.type):
        raise TypeError(f"{function}: {name} has dtype {value.dtype}, {model_name} has {model.dtype}")
    return value


def number(function: str, name: str, value: object, *, least: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{function}: {name} is {value}, it takes a number of at least {least}")
    return float(value)


def integer(function: str, name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{function}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{function}: {name} is {value}, it takes an integer of at least {least}")
    return value


def integers(function: str, name: str, value: object, dims: int, *, least: int) -> list[int]:
    """One integer for every axis, from one for all of them or a sequence of `dims`."""
    if isinstance(value, _INTEGERS):
        return [integer(function, name, value, least=least)] * dims
    if not isinstance(value, (tuple, list)) and (not isinstance(value, Sequence) or isinstance(value, str)):
        raise TypeError(f"{function}: {name} must be an integer or {dims} of them, got {value!r}")
    if len(value) != dims:
        raise ValueError(f"{function}: {name} has {len(value)} values, it takes one or {dims}")
    return [integer(function, name, v, least=least) for v in value]


def weight(function: str, name: str, value: object) -> Tensor:
    value = tensor(function, name, value)
    shape = value.shape
    if len(shape) not in (3, 4):
        raise ValueError(
            f"{function}: {name} has shape {tuple(shape)}, it takes (M, C/groups, k) or (M, C/groups, kh, kw)"
        )
    if 0 in shape:
        raise ValueError(f"{function}: {name} has shape {tuple(shape)}, it takes sizes of at least 1")
    return value


def geometry(function: str, name: str, weight: Tensor, stride, padding, dilation, groups) -> Geometry:
    shape = weight.shape
    dims = len(shape) - 2
    stride = integers(function, "stride", stride, dims, least=1)
    dilation = integers(function, "dilation", dilation, dims, least=1)
    groups = integer(function, "groups", groups, least=1)
    if shape[0] % groups != 0:
        raise ValueError(f"{function}: groups is {groups}, it has to divide the {shape[0]} atoms of {name}")
    if isinstance(padding, str):
        kernel = tuple(shape[2:])
        if padding != "same":
            raise ValueError(f'{function}: padding is {padding!r}, it takes "same", an integer or one for each axis')
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f'{function}: padding="same" takes odd kernels, {name} has kernel {kernel}')
        if any(s != 1 for s in stride):
            raise ValueError(f'{function}: padding="same" takes stride 1, got stride {tuple(stride)}')
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    else:
        padding = integers(function, "padding", padding, dims, least=0)
    return Geometry(stride, padding, dilation, groups)


def code_size(function: str, name: str, signal_size: Sequence[int], weight: Tensor, conv: Geometry) -> list[int]:
    """Spatial size of the code of a signal."""
    size = []
    for n, k, s, p, d in zip(signal_size, weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True):
        if n < 1 or n + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"{function}: kernel {tuple(weight.shape[2:])} with dilation {tuple(conv.dilation)} does not fit into "
                f"{name} of size {tuple(signal_size)} with padding {tuple(conv.padding)}"
            )
        size.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    return size


def signal(function: str, name: str, value: object, weight_name: str, weight: Tensor, groups: int) -> Tensor:
    value = like(function, name, value, weight_name, weight)
    if value.dim() != weight.dim():
        axes = "length" if weight.dim() == 3 else "height, width"
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, it takes (N, C, {axes})")
    if value.shape[1] != weight.shape[1] * groups:
        got = f"{weight.shape[1] * groups} signal channels" + (f" in {groups} groups" if groups > 1 else "")
        raise ValueError(f"{function}: {weight_name} has {got}, {name} has {value.shape[1]}")
    return value


def layer_signal(layer: nn.Module, y: object, weight_name: str, weight: Tensor) -> Geometry:
    """The geometry of a layer, which checked its own when it was made, after a look at the signal that it is given."""
    function = type(layer).__name__
    conv = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    code_size(function, "y", signal(function, "y", y, weight_name, weight, layer.groups).shape[2:], weight, conv)
    return conv


def code(
    function: str, name: str, value: object, weight_name: str, weight: Tensor, batch: int | None, size: Sequence[int]
) -> Tensor:
    """A code of `weight`'s atoms over `size` pixels; `batch` None takes any."""
    value = like(function, name, value, weight_name, weight)
    batch = (value.shape[0] if value.dim() else 0) if batch is None else batch
    expected = (batch, weight.shape[0], *size)
    if tuple(value.shape) != expected:
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, it takes {expected}")
    return value


def threshold(function: str, name: str, value: object, codes: Tensor, channels: int | None) -> Tensor:
    """0-d or (M,), in the dtype of the codes: thresholds follow them as a Python number would."""
    if not isinstance(value, Tensor):
        return torch.full((), number(function, name, value), dtype=codes.dtype, device=codes.device)
    value = tensor(function, name, value)
    if value.dim() == 0:
        return value.to(device=codes.device, dtype=codes.dtype)
    if value.device != codes.device:
        raise ValueError(f"{function}: {name} is on {value.device}, the codes on {codes.device}")
    if channels is None or value.shape != (channels,):
        takes = "a number or a 0-d tensor" if channels is None else f"a number, a 0-d tensor or shape ({channels},)"
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, it takes {takes}")
    return value.to(codes.dtype)
