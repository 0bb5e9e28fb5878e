"""What sparsity promises: uniqueness, stability and rate, from coherences alone.

The deep problem is y = D_1 x_1, x_1 = D_2 x_2, ..., x_{J-1} = D_J x_J with sparse x_j; its numbers, lambda_j =
||x_j||_0, and dictionaries are lists from the first layer on, atoms in columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from dsc_ops import _checks
from dsc_ops.theory import _checks as check
from dsc_ops.theory.coherence import mutual_coherence

__all__ = [
    "UniquenessBound",
    "convergence_rate",
    "deep_uniqueness_bounds",
    "earlier_stability_bounds",
    "is_unique",
    "model_stability_bound",
    "noise_stability_bound",
    "stability_bound",
    "uniqueness_bound",
]


def uniqueness_bound(mu: float | Tensor) -> float:
    """Below this many non-zeros a code is the only one so sparse: (1 + 1/mu) / 2.

    Any two codes of one signal with ||x||_0 < (1 + 1/mu) / 2 are equal, and basis pursuit finds the code (l0 = l1).

    Args:
        mu: a coherence, a number of at least 0, or a dictionary (m, d) of which :func:`mutual_coherence` is taken. With
            the generalised coherence it is the bound on s in :func:`certified_lista`.

    Returns:
        The bound; infinite for mu = 0. Source: Donoho, Elad (PNAS 2003); Li, Feng, Zhou.

    >>> uniqueness_bound(0.2)
    3.0
    """
    if isinstance(mu, Tensor) and mu.dim() > 0:
        mu = mutual_coherence(mu)
    mu = _checks.number("uniqueness_bound", "mu", float(mu) if isinstance(mu, Tensor) else mu, least=0)
    return (1 + 1 / mu) / 2 if mu > 0 else math.inf


@dataclass(frozen=True)
class UniquenessBound:
    """The largest bound on ||x_last||_0, the coherence that gives it, and whose: D_first ... D_last, counted from 1.

    >>> UniquenessBound(3.0, 0.2, first=1, last=2).bound
    3.0
    """

    bound: float
    mu: float
    first: int
    last: int


def deep_uniqueness_bounds(dictionaries: Sequence[Tensor]) -> list[UniquenessBound]:
    """For each layer the largest of the bounds (1 + 1/mu(D_i ... D_j)) / 2, i = 1 .. j, and the product that gives it.

    Where x_{i-1} is unique (x_0 = y is), x_j with fewer non-zeros is unique as a code in D_i ... D_j, whatever lies
    between; so a layer needs to be sparse for one of these products only. :func:`is_unique` follows such chains.

    Args:
        dictionaries: [D_1, ..., D_J].

    Returns:
        One :class:`UniquenessBound` for each layer. A product with a zero column counts as one of coherence 1. Source:
        Li, Feng, Zhou, eq. 1.

    >>> D = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
    >>> [(b.first, b.last, round(b.bound, 3)) for b in deep_uniqueness_bounds([D, torch.eye(3)])]
    [(1, 1, 1.125), (2, 2, inf)]
    """
    dictionaries = check.dictionaries("deep_uniqueness_bounds", "dictionaries", dictionaries)
    return [max(_bounds(dictionaries, j), key=lambda b: b.bound) for j in range(1, len(dictionaries) + 1)]


def _bounds(dictionaries: list[Tensor], last: int) -> list[UniquenessBound]:
    """The bounds on layer ``last`` from the products that start at last, last - 1, ..., 1."""
    product, found = None, []
    for first in range(last, 0, -1):
        factor = check.wide(dictionaries[first - 1])
        product = factor if product is None else factor @ product
        mu = 1.0 if (product == 0).all(dim=0).any() else mutual_coherence(product)
        found.append(UniquenessBound(uniqueness_bound(mu), mu, first, last))
    return found


def is_unique(codes: Sequence[Tensor], dictionaries: Sequence[Tensor], alpha: float = 0.0) -> bool:
    """Whether the theory proves the codes x_1, ..., x_J to be the only ones so sparse for their signal.

    True when layers 0 = j_0 < j_1 < ... < j_n = J exist with ||x_{j_i}||_0 < (1 + 1/mu(D_{j_{i-1}+1} ... D_{j_i})) / 2:
    each x_{j_i} is then unique given the one before, and determines the layers between.

    Args:
        codes: [x_1, ..., x_J], each (d_j,) or a batch (*, d_j), of which the worst sample counts.
        dictionaries: [D_1, ..., D_J].
        alpha: values of at most this size are zeros.

    Returns:
        True, or False when the theory is silent (the codes may be unique all the same). Source: Li, Feng, Zhou,
        eq. 1.

    >>> D = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
    >>> is_unique([torch.tensor([0.0, 0.0, 2.0])], [D]), is_unique([torch.tensor([1.0, 0.0, 2.0])], [D])
    (True, False)
    """
    name = "is_unique"
    dictionaries = check.dictionaries(name, "dictionaries", dictionaries)
    codes = check.one_for_each(name, "codes", codes, len(dictionaries), "one for each dictionary")
    alpha = _checks.number(name, "alpha", alpha, least=0)
    unique = [True]  # the signal itself
    for j, (x, D) in enumerate(zip(codes, dictionaries, strict=True), start=1):
        x = check.vectors(name, f"codes[{j - 1}]", x, f"dictionaries[{j - 1}]", D, D.shape[1])
        count = int((x.abs() > alpha).sum(dim=-1).max()) if x.numel() else 0
        unique.append(any(unique[b.first - 1] and count < b.bound for b in _bounds(dictionaries, j)))
    return unique[-1]


def stability_bound(eps: Sequence[float], lambdas: Sequence[int], dictionaries: Sequence[Tensor]) -> list[float]:
    """How far codes can be from the true ones: delta_j = (eps_j + delta_{j-1}) / sqrt(1 - (2 lambda_j - 1) mu(D_j)).

    Let x_{j-1} = D_j x_j exactly, y = x_0 + noise, delta_0 = ||noise||_2, and let other codes satisfy
    ||x~_{j-1} - D_j x~_j||_2 <= eps_j with x~_0 = y, both with at most lambda_j non-zeros. Then
    ||x_j - x~_j||_2 <= delta_j.

    Args:
        eps: [||noise||_2, eps_1, ..., eps_J].
        lambdas: [lambda_1, ..., lambda_J], each below :func:`uniqueness_bound` of D_j.
        dictionaries: [D_1, ..., D_J]. The source has atoms of unit norm; for others delta_j is divided by the least
            norm of D_j's atoms, which keeps the theorem true.

    Returns:
        [delta_1, ..., delta_J]. Raises ValueError, with the numbers, when a lambda_j is too large. Source: Li, Feng,
        Zhou, Theorem 2.3.

    >>> stability_bound([3.0, 0.0], [1], [torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    [3.0]
    """
    name = "stability_bound"
    dictionaries = check.dictionaries(name, "dictionaries", dictionaries)
    gains = _gains(name, lambdas, dictionaries)
    eps = _errors(name, eps, len(dictionaries) + 1, "the noise and one for each dictionary")
    delta, bounds = eps[0], []
    for own, gain in zip(eps[1:], gains, strict=True):
        delta = (own + delta) * gain
        bounds.append(delta)
    return bounds


def noise_stability_bound(noise: float, lambdas: Sequence[int], dictionaries: Sequence[Tensor]) -> list[float]:
    """The stability bound of exact layers: ||noise||_2 / prod_{i <= j} sqrt(1 - (2 lambda_i - 1) mu(D_i)).

    Args:
        noise: ||noise||_2; the rest as in :func:`stability_bound`, which gives the same.

    Returns:
        [delta_1, ..., delta_J]. Source: Li, Feng, Zhou, the corollary to Theorem 2.3 with eps_j = 0 for j >= 1.

    >>> noise_stability_bound(3.0, [1], [torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    [3.0]
    """
    name = "noise_stability_bound"
    gains = _gains(name, lambdas, check.dictionaries(name, "dictionaries", dictionaries))
    noise = _checks.number(name, "noise", noise, least=0)
    return [noise * math.prod(gains[: j + 1]) for j in range(len(gains))]


def model_stability_bound(eps: Sequence[float], lambdas: Sequence[int], dictionaries: Sequence[Tensor]) -> list[float]:
    """The stability bound without noise: sum_{i <= j} eps_i / prod_{i <= l <= j} sqrt(1 - (2 lambda_l - 1) mu(D_l)).

    Args:
        eps: [eps_1, ..., eps_J], what the layers are wrong by; the rest as in :func:`stability_bound`, which gives the
            same.

    Returns:
        [delta_1, ..., delta_J]. Source: Li, Feng, Zhou, the corollary to Theorem 2.3 with eps_0 = 0.

    >>> model_stability_bound([2.0], [1], [torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    [2.0]
    """
    name = "model_stability_bound"
    gains = _gains(name, lambdas, check.dictionaries(name, "dictionaries", dictionaries))
    eps = _errors(name, eps, len(gains), "one for each dictionary")
    return [sum(eps[i] * math.prod(gains[i : j + 1]) for i in range(j + 1)) for j in range(len(gains))]


def earlier_stability_bounds(
    noise: float, lambdas: Sequence[int], dictionaries: Sequence[Tensor]
) -> dict[str, list[float]]:
    """Earlier bounds on the same errors, for comparison: they count what a layer is wrong by twice.

    "layered": the other codes are known only to explain each layer as well as the true ones would, eps_j = delta_{j-1};
    delta_j = 2 delta_{j-1} / sqrt(1 - (2 lambda_j - 1) mu(D_j)), which doubles with every layer.
    "projected": the other codes satisfy the model exactly and explain y to the noise;
    delta_j = 2 ||noise||_2 / sqrt(1 - (2 lambda_j - 1) mu(D_1 ... D_j)), infinite where lambda_j is too large for the
    product.

    Args:
        noise, lambdas, dictionaries: as in :func:`noise_stability_bound`, whose codes explain y exactly.

    Returns:
        {"layered": [delta_1, ..., delta_J], "projected": [...]}. Source: Papyan, Romano, Elad (JMLR 2017); Sulam,
        Papyan, Romano, Elad (IEEE Transactions on Signal Processing, 2018).

    >>> earlier_stability_bounds(3.0, [1], [torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    {'layered': [6.0], 'projected': [6.0]}
    """
    name = "earlier_stability_bounds"
    dictionaries = check.dictionaries(name, "dictionaries", dictionaries)
    gains = _gains(name, lambdas, dictionaries)
    noise = _checks.number(name, "noise", noise, least=0)
    layered = [noise * math.prod(2 * gain for gain in gains[: j + 1]) for j in range(len(gains))]
    projected, product = [], None
    for count, D in zip(lambdas, dictionaries, strict=True):
        product = check.wide(D) if product is None else product @ check.wide(D)
        projected.append(2 * noise * _gain(product, int(count)))
    return {"layered": layered, "projected": projected}


def _gain(D: Tensor, count: int) -> float:
    """The most by which ||v|| can exceed ||D v|| for v of 2 count non-zeros: by Gershgorin's circles."""
    if (D == 0).all(dim=0).any():
        return math.inf
    left = 1 - (2 * count - 1) * mutual_coherence(D)
    return 1 / (math.sqrt(left) * float(D.norm(dim=0).min())) if left > 0 else math.inf


def _gains(name: str, lambdas: object, dictionaries: list[Tensor]) -> list[float]:
    lambdas = check.one_for_each(name, "lambdas", lambdas, len(dictionaries), "one for each dictionary")
    gains = []
    for j, (count, D) in enumerate(zip(lambdas, dictionaries, strict=True)):
        count = _checks.integer(name, f"lambdas[{j}]", count, least=1)
        gains.append(_gain(check.wide(D), count))
        if gains[-1] == math.inf:
            mu = mutual_coherence(D)
            raise ValueError(
                f"{name}: lambdas[{j}] is {count}, it takes less than (1 + 1/mu) / 2 = {uniqueness_bound(mu):.4g}, "
                f"mu = {mu:.4g} being the coherence of dictionaries[{j}]"
            )
    return gains


def _errors(name: str, eps: object, count: int, what: str) -> list[float]:
    eps = check.one_for_each(name, "eps", eps, count, what)
    return [_checks.number(name, f"eps[{j}]", value, least=0) for j, value in enumerate(eps)]


def convergence_rate(mu: float, s: int) -> float:
    """The rate c of LISTA-CP, ||x_k - x*||_2 <= s B e^{-c k} + C delta: c = -ln((2 s - 1) mu).

    Args:
        mu: (generalised) coherence, at least 0.
        s: non-zeros of x*.

    Returns:
        c; infinite for mu = 0, and not positive when s >= (1 + 1/mu) / 2: no convergence is promised then. Source:
        Chen, Liu, Wang, Yin (NeurIPS 2018), Theorem 2; Li, Feng, Zhou.

    >>> round(convergence_rate(0.1, 3), 4)
    0.6931
    """
    if not isinstance(mu, Real):
        raise TypeError(f"convergence_rate: mu must be a number, got {type(mu).__name__}")
    mu = _checks.number("convergence_rate", "mu", mu, least=0)
    s = _checks.integer("convergence_rate", "s", s, least=1)
    return -math.log((2 * s - 1) * mu) if mu > 0 else math.inf
