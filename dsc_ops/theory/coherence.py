"""How much the atoms of a dictionary resemble each other: the numbers that all guarantees start from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsc_ops.theory import _checks as check
from dsc_ops.theory import _programmes as programmes

__all__ = ["analytic_coherence", "coherence_certificate", "generalized_coherence", "mutual_coherence"]

# Room for the second stage within the first one's optimum: HiGHS meets a constraint to 1e-10.
_SLACK = 1e-9


def mutual_coherence(D: Tensor) -> float:
    """Mutual coherence: mu(D) = max_{i != j} |d_i^T d_j| / (||d_i|| ||d_j||).

    Args:
        D: dictionary (m, d), atoms in columns, of any norm but zero.

    Returns:
        A number from 0 to 1; 0 for a single atom. Source: Donoho, Elad (PNAS 2003); Li, Feng, Zhou.

    >>> round(mutual_coherence(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])), 4)
    0.8
    """
    D = check.wide(check.dictionary("mutual_coherence", "D", D))
    D = D / D.norm(dim=0)
    return largest_off_diagonal(D.T @ D)


def largest_off_diagonal(products: Tensor) -> float:
    """The largest absolute value beside the diagonal; 0 when there is none."""
    return float((products - torch.diag(products.diagonal())).abs().max())


def generalized_coherence(D: Tensor) -> tuple[float, Tensor]:
    """Generalised mutual coherence: mu~(D) = min over W with w_i^T d_i = 1 of max_{i != j} |w_i^T d_j|.

    The columns of W decouple into one linear programme each, solved by HiGHS on all cores, with a progress bar when
    that takes more than two seconds. A second programme for each column then finds, among all W that reach mu~, the one
    whose largest entry C_W = max |W_ij| is least: an element of X(D).

    Args:
        D: dictionary (m, d), atoms in columns.

    Returns:
        mu~, with mu~ <= mu(D) when the atoms have unit norm, and W (m, d), in D's dtype. mu~ is measured on this W in
        float64 (before W is rounded to D's dtype) and so never too small; :func:`coherence_certificate` bounds it from
        below. Raises ImportError without scipy. Source: Chen, Liu, Wang, Yin (NeurIPS 2018); Li, Feng, Zhou.

    >>> mu, W = generalized_coherence(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]))
    >>> round(mu, 4), W.shape
    (0.7143, torch.Size([2, 3]))
    """
    D = check.dictionary("generalized_coherence", "D", D)
    atoms = check.wide(D).cpu().numpy()
    first = programmes.solve_each(lambda i: _least_coherent(atoms, i), atoms.shape[1], "coherence")
    reached = max(_coherence(atoms, w, i) for i, w in enumerate(first))
    second = programmes.solve_each(lambda i: _least_entries(atoms, i, reached), atoms.shape[1], "least entries")
    W = [w if b is None or np.abs(b).max() > np.abs(w).max() else b for w, b in zip(first, second, strict=True)]
    mu = max(_coherence(atoms, w, i) for i, w in enumerate(W))
    return mu, torch.from_numpy(np.stack(W, axis=1)).to(D)


def _least_coherent(atoms: np.ndarray, index: int) -> np.ndarray:
    """The w with w^T d_i = 1 of least max_j |w^T d_j|: the dual optimum of writing d_i by the other atoms."""
    others, atom = np.delete(atoms, index, axis=1), atoms[:, index]
    found = programmes.least_l1(others, atom)
    if found is None:  # independent of the others: there is a w orthogonal to all of them
        outside = atom - others @ np.linalg.lstsq(others, atom, rcond=None)[0]
        return outside / (outside @ atom)
    return found[1] / (found[1] @ atom)


def _least_entries(atoms: np.ndarray, index: int, coherence: float) -> np.ndarray | None:
    others, atom = np.delete(atoms, index, axis=1), atoms[:, index]
    w = programmes.least_entries(others, atom, coherence * (1 + _SLACK) + 1e-12)
    return None if w is None else w / (w @ atom)


def _coherence(atoms: np.ndarray, w: np.ndarray, index: int) -> float:
    products = np.abs(w @ atoms)
    products[index] = 0
    return float(products.max())


def coherence_certificate(D: Tensor) -> tuple[float, Tensor]:
    """A proof from below of mu~(D), and of a matrix C that anyone can check: D C = D, zeros on the diagonal of C.

    If d_i = sum_{j != i} c_ji d_j, every w with w^T d_i = 1 has 1 <= ||c_i||_1 max_j |w^T d_j|, and therefore
    mu~(D) >= max_i 1 / ||c_i||_1. The c_i of least l1 norm (one linear programme each) make this an equality.

    Args:
        D: dictionary (m, d), atoms in columns.

    Returns:
        max_i 1 / ||c_i||_1, and C (d, d), in D's dtype. An atom that the others do not span has no c_i: its column is
        infinite, and it gives the bound 0. Raises ImportError without scipy. Source: linear programming duality.

    >>> nu, C = coherence_certificate(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]))
    >>> round(nu, 4)
    0.7143
    """
    D = check.dictionary("coherence_certificate", "D", D)
    atoms = check.wide(D).cpu().numpy()
    count = atoms.shape[1]

    def column(index: int) -> np.ndarray:
        found = programmes.least_l1(np.delete(atoms, index, axis=1), atoms[:, index])
        return np.full(count, np.inf) if found is None else np.insert(found[0], index, 0.0)

    C = np.stack(programmes.solve_each(column, count, "certificate"), axis=1)
    return float((1 / np.abs(C).sum(axis=0)).max()), torch.from_numpy(C).to(D)


def analytic_coherence(D: Tensor) -> tuple[float, Tensor, float]:
    """Weights in closed form in place of linear programmes, for large D, with how much they can lose.

    w_j = G^{-1} d_j / (d_j^T G^{-1} d_j) with G = D D^T minimises ||W^T D||_F under w_j^T d_j = 1. With the projection
    P = D^T G^{-1} D, its coherence is max_{i != j} |P_ij| / P_ii. The same P gives c_i = P_ji / (1 - P_ii), an
    expansion of d_i in the other atoms, hence mu~(D) >= max_i (1 - P_ii) / sum_{j != i} |P_ij|, as in
    :func:`coherence_certificate`.

    Args:
        D: dictionary (m, d), atoms in columns. G is inverted on the span of D when D has not full row rank.

    Returns:
        The coherence of the weights, the weights (m, d) in D's dtype, and the gap: that coherence less the lower bound.
        mu~(D) is at most the first and at least the first less the gap. Source: Liu, Chen, Wang, Yin (ICLR 2019).

    >>> mu, W, gap = analytic_coherence(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]))
    >>> round(mu, 4), round(gap, 4)
    (0.8, 0.0857)
    """
    D = check.dictionary("analytic_coherence", "D", D)
    atoms = check.wide(D)
    dual = torch.linalg.pinv(atoms, rtol=1e-12).T  # G^{-1} D on the span
    P = dual.T @ atoms
    level = P.diagonal()
    others = (P - torch.diag(level)).abs()
    mu = float((others.amax(dim=1) / level).max())
    left, total = 1 - level, others.sum(dim=1)
    # An atom that the others do not span has level 1, and all its products are rounding.
    lower = torch.where(left > 1e-9, left / total.clamp(min=1e-300), 0.0)
    return mu, (dual / level).to(D), max(mu - float(lower.max()), 0.0)
