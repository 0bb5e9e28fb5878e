"""Argument checks of the theory's functions, beside those of :mod:`dsc_ops._checks`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsc_ops import _checks as check


def matrix(function: str, name: str, value: object) -> Tensor:
    """A finite matrix that is not empty."""
    value = check.tensor(function, name, value)
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, it takes (m, d), sizes of at least 1")
    if not value.isfinite().all():
        raise ValueError(f"{function}: {name} has values that are not finite")
    return value


def dictionary(function: str, name: str, value: object) -> Tensor:
    """A matrix with atoms in columns, none of them zero."""
    value = matrix(function, name, value)
    zero = (value == 0).all(dim=0)
    if zero.any():
        raise ValueError(f"{function}: {name} has a zero column, number {int(zero.nonzero()[0])}: it takes atoms")
    return value


def dictionaries(function: str, name: str, value: object) -> list[Tensor]:
    """D_1, ..., D_J whose product exists."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or not len(value):
        raise TypeError(f"{function}: {name} must be a sequence of at least one matrix, got {type(value).__name__}")
    made = [dictionary(function, f"{name}[{j}]", D) for j, D in enumerate(value)]
    for j, (D, after) in enumerate(zip(made, made[1:], strict=False)):
        check.like(function, f"{name}[{j + 1}]", after, f"{name}[{j}]", D)
        if D.shape[1] != after.shape[0]:
            raise ValueError(
                f"{function}: {name}[{j + 1}] has shape {tuple(after.shape)}, it takes {D.shape[1]} rows, as many as "
                f"{name}[{j}] has columns"
            )
    return made


def vectors(function: str, name: str, value: object, model_name: str, model: Tensor, length: int) -> Tensor:
    """Samples (*, length), one in each row."""
    value = check.like(function, name, value, model_name, model)
    if value.dim() < 1 or value.shape[-1] != length:
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, it takes (*, {length})")
    return value


def like_matrix(function: str, name: str, value: object, model_name: str, model: Tensor) -> Tensor:
    """A finite matrix with the dtype, device and shape of another."""
    value = check.like(function, name, value, model_name, model)
    if value.shape != model.shape:
        raise ValueError(
            f"{function}: {name} has shape {tuple(value.shape)}, it takes that of {model_name}, {tuple(model.shape)}"
        )
    return matrix(function, name, value)


def module(function: str, name: str, value: object, *kinds: type[nn.Module]) -> nn.Module:
    """A module of one of the given kinds."""
    if not isinstance(value, kinds):
        takes = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{function}: {name} must be a {takes}, got {type(value).__name__}")
    return value


def one_for_each(function: str, name: str, value: object, count: int, what: str) -> Sequence:
    """A sequence of ``count``."""
    if isinstance(value, str) or not isinstance(value, Sequence | Tensor):
        raise TypeError(f"{function}: {name} must be a sequence of {count} {what}, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"{function}: {name} has {len(value)} values, it takes {count}, {what}")
    return value.tolist() if isinstance(value, Tensor) else value


def wide(value: Tensor) -> Tensor:
    """The numbers on which the theory computes: float64 without history."""
    return value.detach().to(torch.float64)
