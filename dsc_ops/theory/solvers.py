"""Networks and solvers with a proof: LISTA-CP certified for a dictionary, the deep problem, basis pursuit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_ops import _checks, functional
from dsc_ops.layers import LISTALinear
from dsc_ops.theory import _checks as check
from dsc_ops.theory import _programmes as programmes
from dsc_ops.theory.coherence import generalized_coherence
from dsc_ops.theory.guarantees import convergence_rate, uniqueness_bound

__all__ = ["Certificate", "DeepCodes", "basis_pursuit", "certified_lista", "dsc_solve", "iterates"]

METHODS = ("layerwise", "deepest-first")


def basis_pursuit(y: Tensor, D: Tensor) -> Tensor:
    """The code of least l1 norm: min ||x||_1 subject to D x = y, one linear programme a sample.

    Where ||x*||_0 < (1 + 1/mu(D)) / 2 it is the sparsest code x* (l0 = l1), for any signal y = D x*.

    Args:
        y: signals (*, m).
        D: dictionary (m, d), atoms in columns.

    Returns:
        Codes (*, d). Raises ValueError when a signal is not in the span of D, ImportError without scipy. Source: Chen,
        Donoho, Saunders (SIAM Journal on Scientific Computing, 1998); Li, Feng, Zhou.

    >>> D = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
    >>> basis_pursuit(torch.tensor([1.2, 1.6]), D).abs()
    tensor([0., 0., 2.])
    """
    D = check.dictionary("basis_pursuit", "D", D)
    y = check.vectors("basis_pursuit", "y", y, "D", D, D.shape[0])
    rows, atoms = check.wide(y).reshape(-1, D.shape[0]).cpu().numpy(), check.wide(D).cpu().numpy()
    found = programmes.solve_each(lambda n: programmes.least_l1(atoms, rows[n]), len(rows), "basis pursuit")
    for n, pair in enumerate(found):
        if pair is None:
            raise ValueError(f"basis_pursuit: y is not in the span of D (sample {n}): no x has D x = y")
    codes = torch.tensor([pair[0].tolist() for pair in found], dtype=torch.float64)
    return codes.reshape(*y.shape[:-1], D.shape[1]).to(D)


@dataclass(frozen=True)
class _Weights:
    """W for a dictionary, with w_i^T d_i = 1, and its numbers, measured on W and D as rounded to their dtype."""

    W: Tensor
    mu: float  # max_{i != j} |w_i^T d_j|
    largest: float  # C_W = max |W_ij|
    off: float  # max |w_i^T d_i - 1|: rounding


def _weights(name: str, D: Tensor, W: Tensor | None) -> _Weights:
    if W is None:
        W = generalized_coherence(D)[1]
    else:
        W = check.like_matrix(name, "W", W, "D", D)
    products = (check.wide(W) * check.wide(D)).sum(dim=0)
    if not (products > 0).all():
        raise ValueError(f"{name}: W has a column with w_i^T d_i = {float(products.min()):.4g}, it takes above 0")
    W = (check.wide(W) / products).to(D)
    gram = check.wide(W).T @ check.wide(D)
    level = gram.diagonal()
    mu = float((gram - torch.diag(level)).abs().max())
    return _Weights(W, mu, float(W.abs().max()), float((level - 1).abs().max()))


@dataclass(frozen=True)
class Certificate:
    """The constants of ||x_k - x*||_2 <= s B e^{-rate k} + C delta.

    Attributes:
        mu: coherence of the weights with the dictionary, mu~ for weights in X(D).
        C_W: their largest entry.
        rate: c = -ln((2 s - 1) mu).
        C: 2 s C_W / (1 - (2 s - 1) mu).

    >>> Certificate(mu=0.1, C_W=1.0, rate=0.7, C=4.0).rate
    0.7
    """

    mu: float
    C_W: float
    rate: float
    C: float


def certified_lista(
    D: Tensor,
    *,
    B: float,
    s: int,
    delta: float = 0.0,
    iterations: int,
    W: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[LISTALinear, Tensor]:
    """A LISTA-CP network that provably finds every s-sparse code of a dictionary, and its error after each iteration.

    For y = D x* + noise with ||x*||_0 <= s, ||x*||_inf <= B, ||noise||_1 <= delta: the network's weights are a W in
    X(D) and its thresholds those of Li, Feng, Zhou, eq. 7, theta_k = mu~ e_k + C_W delta, where

        e_0 = s B,    e_{k+1} = (2 s - 1) mu~ e_k + 2 s C_W delta

    bounds sup ||x_k - x*||_1. Then for every k the support of x_k lies within that of x*, and ||x_k - x*||_2 <= e_k,
    which is s B e^{-c k} + C delta with c of :func:`convergence_rate`.

    Args:
        D: dictionary (m, d), atoms in columns, of any norm; m, d >= 1.
        B: bound on ||x*||_inf.
        s: bound on ||x*||_0, below (1 + 1/mu~) / 2.
        delta: bound on the noise, ||noise||_1.
        iterations: K.
        W: weights (m, d) to certify with their own coherence and C_W in place of those of
            :func:`generalized_coherence`, which takes 2 d linear programmes; the ones of
            :func:`dsc_ops.theory.analytic_coherence` for example. Columns are scaled to w_i^T d_i = 1.
        beta: the certificate also holds for the network with another activation rho
            (:func:`dsc_ops.theory.lista_with_activation`) with |rho(v) - relu(v)| <= beta for all v. Codes are then
            small instead of 0 outside of the support, 2 beta (d - s) in l1 norm at most, and e_{k+1} = (2 s - 1) mu~
            e_k + 2 s (C_W delta + beta) + (1 + mu~) 2 beta (d - s) (Theorem 3.4, error O(beta)).

    Returns:
        The network (untied, D's dtype and device, y (*, m) to codes (*, d)) and e_1 .. e_K, (iterations,), float64. Its
        attribute ``certificate`` has the rate c and the constants, a :class:`Certificate`. Thresholds and bounds count
        in the rounding of the network's own arithmetic, at its worst, as noise. Raises ValueError, with the numbers,
        when s is too large. Source: Li, Feng, Zhou, eq. 7; Chen, Liu, Wang, Yin, Theorem 2.

    >>> D = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]], dtype=torch.float64)
    >>> network, bounds = certified_lista(D, B=2.0, s=1, iterations=60)
    >>> network(torch.tensor([1.2, 1.6], dtype=torch.float64)).detach(), bool(bounds[-1] < 1e-8)
    (tensor([0.0000, 0.0000, 2.0000], dtype=torch.float64), True)
    """
    name = "certified_lista"
    D = check.dictionary(name, "D", D)
    B = _checks.number(name, "B", B, least=0)
    s = _checks.integer(name, "s", s, least=1)
    delta = _checks.number(name, "delta", delta, least=0)
    iterations = _checks.integer(name, "iterations", iterations, least=1)
    beta = _checks.number(name, "beta", beta, least=0)
    weights = _weights(name, D, W)
    _check_sparsity(name, "s", s, weights.mu)
    network, bounds = _network(D, weights, min(s, D.shape[1]) * B, s, delta, iterations, beta)
    C = 2 * s * weights.largest / (1 - (2 * s - 1) * weights.mu)
    network.certificate = Certificate(weights.mu, weights.largest, convergence_rate(weights.mu, s), C)
    return network, bounds


def _check_sparsity(name: str, argument: str, s: int, mu: float) -> None:
    bound = uniqueness_bound(mu)
    if s >= bound:
        raise ValueError(
            f"{name}: {argument} is {s}, it takes less than (1 + 1/mu) / 2 = {bound:.4g}, mu = {mu:.4g} being the "
            "coherence of the weights with the dictionary; nothing is promised for so many non-zeros"
        )


def _network(
    D: Tensor, weights: _Weights, start: float, s: int, delta: float, iterations: int, beta: float
) -> tuple[LISTALinear, Tensor]:
    """The network for ||x*||_1 <= start, and the bounds."""
    mu, largest, count = weights.mu, weights.largest, D.shape[1]
    inside, outside = start, 0.0  # bounds on the l1 error on the support of x* and beside it
    thetas, bounds = [], []
    for _ in range(iterations):
        error = inside + outside
        noise = largest * delta + _rounding(D, weights, start, error, s if beta == 0 else count, delta)
        noise += weights.off * outside
        # Rounded up, so that the threshold in the network's dtype is no smaller.
        theta = (mu * error + noise) * (1 + 4 * torch.finfo(D.dtype).eps) + torch.finfo(D.dtype).tiny
        inside = (s - 1) * mu * inside + weights.off * inside + s * mu * outside + s * (noise + theta + 2 * beta)
        outside = 2 * beta * max(count - s, 0)
        thetas.append(theta)
        bounds.append(inside + outside)
    layer = LISTALinear.from_dictionary(D.detach().T, iterations)
    with torch.no_grad():
        layer.analysis.copy_(weights.W.T.expand_as(layer.analysis))
        layer.theta.copy_(torch.tensor(thetas, dtype=torch.float64).unsqueeze(1).expand_as(layer.theta))
    return layer, torch.tensor(bounds, dtype=torch.float64, device=D.device)


def _rounding(D: Tensor, weights: _Weights, start: float, error: float, count: int, delta: float) -> float:
    """A bound on the rounding errors in one entry of x + W^T(y - D x), including those that made y.

    gamma_n = n u / (1 - n u) bounds the relative error of a sum of n products in any order (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1). D x sums ``count`` products of entries up to max |D|; what cancels
    is of size ||x*||_1 + ||x||_1 <= 2 start + error.
    """
    m, unit = D.shape[0], torch.finfo(D.dtype).eps / 2
    entry, sizes = float(D.detach().abs().max()), 2 * start + error

    def gamma(n: int) -> float:
        return n * unit / (1 - n * unit) if n * unit < 0.5 else math.inf

    residual = gamma(count + 3) * (entry * sizes + delta)
    return weights.largest * m * (residual + gamma(m + 3) * (entry * error + delta)) + gamma(m + 3) * sizes


@torch.no_grad()
def iterates(layer: LISTALinear, y: Tensor) -> Tensor:
    """The codes after each iteration of a network: x_1, ..., x_K, the last being ``layer(y)``.

    Args:
        layer: :class:`dsc_ops.LISTALinear`.
        y: signals (*, m).

    Returns:
        (K, *, d). Equivalent to K networks cut after 1, ..., K iterations. Source: Li, Feng, Zhou, eq. 6.

    >>> layer = LISTALinear(20, 50, iterations=4)
    >>> iterates(layer, torch.zeros(3, 20)).shape
    torch.Size([4, 3, 50])
    """
    layer = check.module("iterates", "layer", layer, LISTALinear)
    y = check.vectors("iterates", "y", y, "dictionary", layer.dictionary, layer.in_features)
    rows = y.reshape(-1, layer.in_features, 1)
    x, found = rows.new_zeros(rows.shape[0], layer.code_features, 1), []
    for k in range(layer.iterations):
        W, theta = (layer.analysis[k], layer.theta[k]) if layer.untied else (layer.analysis, layer.theta)
        x = functional.lista_step(
            x, rows, layer.dictionary.unsqueeze(-1), W.unsqueeze(-1), theta, one_sided=layer.one_sided
        )
        found.append(x.reshape(*y.shape[:-1], layer.code_features))
    return torch.stack(found)


class DeepCodes(list):
    """The codes [x_1, ..., x_J] of :func:`dsc_solve`, with what is promised of them.

    Attributes:
        bounds: [b_1, ..., b_J] with ||x_j - x*_j||_2 <= b_j for every sample.
        residuals: [||y - D_1 x_1||_2, ..., ||x_{J-1} - D_J x_J||_2], each (*).

    >>> DeepCodes([torch.zeros(2)], bounds=[0.5], residuals=[torch.tensor(0.0)]).errors([torch.zeros(2)])
    [tensor(0.)]
    """

    def __init__(self, codes: Sequence[Tensor], bounds: list[float], residuals: list[Tensor]):
        super().__init__(codes)
        self.bounds, self.residuals = bounds, residuals

    def errors(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """The measured errors ||x_j - x*_j||_2, each (*), given the true codes."""
        codes = check.one_for_each("DeepCodes.errors", "codes", codes, len(self), "one for each layer")
        return [(x - truth).norm(dim=-1) for x, truth in zip(self, codes, strict=True)]


def dsc_solve(
    y: Tensor,
    dictionaries: Sequence[Tensor],
    *,
    sparsity: Sequence[int],
    method: str = "layerwise",
    iterations: int,
    delta: float = 0.0,
    weights: Sequence[Tensor] | None = None,
) -> DeepCodes:
    """The codes of a deep sparse model, y = D_1 x_1 + noise, x_{j-1} = D_j x_j, by certified LISTA-CP networks.

    "layerwise": x_1 from y, then x_2 from x_1 and so on; what x_{j-1} is wrong by is the noise of layer j, so the
    errors add. "deepest-first": x_J from y = (D_1 ... D_J) x_J, then x_{j-1} = D_j x_j down to x_1.

    Args:
        y: signals (*, m).
        dictionaries: [D_1, ..., D_J].
        sparsity: [s_1, ..., s_J], ||x_j||_0 <= s_j; each below (1 + 1/mu~(D_j)) / 2 layer by layer; deepest first only
            s_J counts, and its bound is that of the product.
        method: "layerwise" or "deepest-first".
        iterations: of each network.
        delta: bound on the noise, ||noise||_1.
        weights: [W_1, ..., W_J] in place of linear programmes, see :func:`certified_lista`; deepest first [W].

    Returns:
        :class:`DeepCodes`: a list [x_1, ..., x_J], each (*, d_j), with ``bounds``, ``residuals`` and ``errors(codes)``.
        The bound B on ||x_j||_inf comes from the signal: (max |W^T y| + C_W delta) / (1 - (s - 1) mu~). Raises
        ValueError, with the numbers, when an s_j is too large. Source: Li, Feng, Zhou.

    >>> D = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]], dtype=torch.float64)
    >>> codes = dsc_solve(torch.tensor([1.2, 1.6], dtype=torch.float64), [D], sparsity=[1], iterations=60)
    >>> codes, codes.bounds[0] < 1e-8
    ([tensor([0.0000, 0.0000, 2.0000], dtype=torch.float64)], True)
    """
    name = "dsc_solve"
    dictionaries = check.dictionaries(name, "dictionaries", dictionaries)
    y = check.vectors(name, "y", y, "dictionaries[0]", dictionaries[0], dictionaries[0].shape[0])
    sparsity = check.one_for_each(name, "sparsity", sparsity, len(dictionaries), "one for each dictionary")
    sparsity = [_checks.integer(name, f"sparsity[{j}]", s, least=1) for j, s in enumerate(sparsity)]
    if method not in METHODS:
        raise ValueError(f"{name}: method is {method!r}, it takes one of {', '.join(METHODS)}")
    iterations = _checks.integer(name, "iterations", iterations, least=1)
    delta = _checks.number(name, "delta", delta, least=0)
    networks = len(dictionaries) if method == "layerwise" else 1
    if weights is not None:
        weights = check.one_for_each(name, "weights", weights, networks, "one for each network")
    else:
        weights = [None] * networks
    if method == "layerwise":
        codes, bounds, signal, noise = [], [], y, delta
        for j, (D, s, W) in enumerate(zip(dictionaries, sparsity, weights, strict=True)):
            signal, noise = _solve_layer(f"sparsity[{j}]", signal, D, s, noise, iterations, W)
            codes.append(signal)
            bounds.append(noise)
    else:
        products = [check.wide(dictionaries[-1])]  # D_j ... D_J, from the last to the first
        for D in reversed(dictionaries[:-1]):
            products.insert(0, check.wide(D) @ products[0])
        argument = f"sparsity[{len(sparsity) - 1}]"
        product = check.dictionary(name, "the product of dictionaries", products[0].to(y))
        x, bound = _solve_layer(argument, y, product, sparsity[-1], delta, iterations, weights[0])
        codes, bounds = [x], [bound]
        for D, rest in zip(dictionaries[:0:-1], products[:0:-1], strict=True):
            codes.insert(0, codes[0] @ D.T)
            bounds.insert(0, float(torch.linalg.matrix_norm(rest, 2)) * bound + _product_rounding(D, codes[1]))
    signals = [y, *codes[:-1]]
    residuals = [(z - x @ D.T).norm(dim=-1) for z, x, D in zip(signals, codes, dictionaries, strict=True)]
    return DeepCodes(codes, bounds, residuals)


@torch.no_grad()
def _solve_layer(
    argument: str, y: Tensor, D: Tensor, s: int, delta: float, iterations: int, W: Tensor | None
) -> tuple[Tensor, float]:
    """The code of one layer and the bound on its error, in the l1 and so also in the l2 norm."""
    weights = _weights("dsc_solve", D, W)
    _check_sparsity("dsc_solve", argument, s, weights.mu)
    largest = float((check.wide(y) @ check.wide(weights.W)).abs().max()) if y.numel() else 0.0
    B = (largest + weights.largest * delta) / (1 - (s - 1) * weights.mu - weights.off)
    layer, bounds = _network(D, weights, s * B, s, delta, iterations, 0.0)
    return layer(y), float(bounds[-1])


def _product_rounding(D: Tensor, x: Tensor) -> float:
    """A bound on the rounding of D x in the l2 norm, for the largest sample."""
    unit = torch.finfo(D.dtype).eps * D.shape[1]
    return unit * float((check.wide(x).abs() @ check.wide(D).abs().T).norm(dim=-1).max()) if x.numel() else 0.0
