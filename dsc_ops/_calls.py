"""The operators on arguments that fit together: checked ones, or those of a layer, which checked its own when made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsc_ops._checks import Geometry

_ops = torch.ops.dsc_ops
# Private names of torch 2.10 to 2.14; without them all calls take the longer way.
_BelowAutograd = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
_transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
_short_way = _BelowAutograd is not None and _transformed is not None and hasattr(forward_ad, "_current_level")


def _call(operator: Callable, *arguments: Any) -> Any:
    """Without gradients, past the operator's rule for autograd: that is Python, and takes as long as a tiny kernel."""
    if (
        not _short_way
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or _transformed()
    ):
        return operator(*arguments)
    with _BelowAutograd():
        return operator(*arguments)


def conv_soft_threshold(
    y: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, conv: Geometry, one_sided: bool
) -> Tensor:
    """T(A_W(y) + bias); theta is taken in the dtype of y, as by lista."""
    if theta.dtype != y.dtype:
        theta = theta.to(y.dtype)
    return _call(_ops.conv_soft_threshold, y, weight, bias, theta, *conv.arguments(), bool(one_sided))


def lista(
    y: Tensor,
    dictionary: Tensor,
    analysis: Tensor,
    theta: Tensor,
    x0: Tensor | None,
    momentum: list[float],
    iterations: int,
    conv: Geometry,
    one_sided: bool,
) -> Tensor:
    """K steps; theta and analysis of all iterations, or one of each for all."""
    if theta.dtype != y.dtype:
        theta = theta.to(y.dtype)
    if theta.dim() != 2 or theta.shape[1] != dictionary.shape[0]:
        theta = theta.expand(iterations, dictionary.shape[0])
    if analysis.dim() == dictionary.dim():
        analysis = analysis.unsqueeze(0)
    tensors = (y, dictionary, analysis, theta, x0)
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _call(_ops.lista, *tensors, momentum, *conv.arguments(), bool(one_sided), keep_tape)[0]
