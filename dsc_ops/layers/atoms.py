"""Constraints on atoms, as parametrizations of PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsc_ops import _checks as check


class UnitNormAtoms(nn.Module):
    """Atoms of unit norm: d_i = w_i / ||w_i||_2, w being what is learned; for torch.nn.utils.parametrize.

    Args:
        stacked: the weight is (K, M, ...), one for each iteration, as ``analysis`` of an untied layer; else (M, ...).

    The norm is over all but the first axis (the first two when ``stacked``). The gradient of w is that of d less its
    part along d, over ||w||. An atom of zeros stays what it is and has the gradient of d, so that it can leave. What
    is assigned to the parametrized weight becomes w. Raises ``ValueError`` for a weight of fewer dimensions.
    Source: dictionary learning's constraint ||d_i|| = 1.

    >>> from dsc_ops import LISTAConv
    >>> layer = LISTAConv(1, 4, 3)
    >>> _ = nn.utils.parametrize.register_parametrization(layer, "dictionary", UnitNormAtoms())
    >>> layer.dictionary = 5 * torch.ones(4, 1, 3, 3)
    >>> layer.dictionary.flatten(1).norm(dim=1).detach()
    tensor([1., 1., 1., 1.])
    """

    def __init__(self, *, stacked: bool = False):
        super().__init__()
        self.stacked = bool(stacked)

    def forward(self, weight: Tensor) -> Tensor:
        weight = check.tensor("UnitNormAtoms", "weight", weight)
        leading = 2 if self.stacked else 1
        if weight.dim() <= leading:
            takes = "(K, M, ...)" if self.stacked else "(M, ...)"
            raise ValueError(f"UnitNormAtoms: weight has shape {tuple(weight.shape)}, it takes {takes}")
        axes = tuple(range(leading, weight.dim()))
        # In float64, where the squares of small float32 values are no zeros.
        norm = torch.linalg.vector_norm(weight, dim=axes, keepdim=True, dtype=torch.float64)
        return (weight / torch.where(norm == 0, 1, norm)).to(weight.dtype)

    def right_inverse(self, atoms: Tensor) -> Tensor:
        """Atoms of unit norm are their own w."""
        return atoms

    def extra_repr(self) -> str:
        return f"stacked={self.stacked}"
