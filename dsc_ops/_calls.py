"""The operators on arguments that fit together: checked ones, or those of a layer, which checked its own when made."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_ops._checks import Geometry

_ops = torch.ops.dsc_ops


def conv_soft_threshold(
    y: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, conv: Geometry, one_sided: bool
) -> Tensor:
    """T(A_W(y) + bias)."""
    return _ops.conv_soft_threshold(y, weight, bias, theta, *conv.arguments(), bool(one_sided))


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
    if theta.dim() != 2 or theta.shape[1] != dictionary.shape[0]:
        theta = theta.expand(iterations, dictionary.shape[0])
    if analysis.dim() == dictionary.dim():
        analysis = analysis.unsqueeze(0)
    tensors = (y, dictionary, analysis, theta, x0)
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _ops.lista(*tensors, momentum, *conv.arguments(), bool(one_sided), keep_tape)[0]
