"""The simulated experiments of the theory: problems that satisfy its assumptions, and what is measured on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_ops import LISTALinear, functional, theory

METHODS = ("layerwise", "deepest-first")


def spikes_and_hadamard(m: int) -> Tensor:
    """[I, H / sqrt(m)], m a power of 2: atoms of two orthonormal bases, mutual coherence 1 / sqrt(m)."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < m:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return torch.cat([torch.eye(m, dtype=torch.float64), H / m**0.5], dim=1)


def graph_dictionary(rows: int, columns: int, girth: int, seed: int) -> Tensor:
    """Atoms of two entries, the edges of a random graph in which no cycle is shorter than ``girth``.

    A sparse code makes a sparse signal with it. An atom is made of others only along a cycle, so mu~ = 1 / (g - 1) with
    the length g of the shortest one, while mu is 1/2: where mu promises one non-zero, mu~ promises g / 2.
    """
    generator = torch.Generator().manual_seed(seed)
    beside: list[set[int]] = [set() for _ in range(rows)]
    D = torch.zeros(rows, columns, dtype=torch.float64)
    made = 0
    for _ in range(1000 * columns):
        one, other = torch.randint(rows, (2,), generator=generator).tolist()
        reached = front = {one}
        for _ in range(girth - 2):
            front = set().union(*[beside[place] for place in front]) - reached
            reached = reached | front
        if other in reached:
            continue
        beside[one].add(other)
        beside[other].add(one)
        D[[one, other], made] = torch.randn(2, generator=generator, dtype=torch.float64).sign() / 2**0.5
        made += 1
        if made == columns:
            return D
    raise RuntimeError(f"no graph of {rows} places and {columns} edges without cycles shorter than {girth} was found")


def model(sizes: tuple[int, ...], girths: tuple[int, ...], seed: int) -> list[Tensor]:
    """[D_1, ..., D_J]: signals of sizes[0] numbers, codes of 2 sizes[0], sizes[1], ... entries."""
    dictionaries = [spikes_and_hadamard(sizes[0])]
    for columns, girth in zip(sizes[1:], girths, strict=True):
        dictionaries.append(graph_dictionary(dictionaries[-1].shape[1], columns, girth, seed))
    return dictionaries


def sparse_codes(count: int, d: int, s: int, generator: torch.Generator) -> Tensor:
    """Codes of s non-zeros, uniform in [-1, 1]."""
    order = torch.rand(count, d, generator=generator).argsort(dim=1)
    values = 2 * torch.rand(count, d, generator=generator, dtype=torch.float64) - 1
    return torch.where(order < s, values, 0.0)


def errors_against_depth(
    dictionaries: list[Tensor], nonzeros: int, deltas: Sequence[float], depths: Sequence[int], count: int, seed: int
) -> list[dict[str, Any]]:
    """The largest error over ``count`` problems and the bound, for each layer, method and noise, against K."""
    generator = torch.Generator().manual_seed(seed)
    codes = [sparse_codes(count, dictionaries[-1].shape[1], nonzeros, generator)]
    product = dictionaries[-1]
    for D in dictionaries[-2::-1]:
        product = D @ product
    for D in dictionaries[:0:-1]:
        codes.insert(0, codes[0] @ D.T)
    sparsity = [int((x != 0).sum(dim=1).max()) for x in codes]
    noise = torch.randn(count, len(product), generator=generator, dtype=torch.float64)
    noise = noise / noise.abs().sum(dim=1, keepdim=True)
    rows = []
    for method in METHODS:
        found = [theory.generalized_coherence(D) for D in (dictionaries if method == "layerwise" else [product])]
        weights = [W for _, W in found]
        for delta in deltas:
            errors, bounds = [], []
            for depth in depths:
                solution = theory.dsc_solve(
                    codes[0] @ dictionaries[0].T + delta * noise,
                    dictionaries,
                    sparsity=sparsity,
                    method=method,
                    iterations=depth,
                    delta=delta,
                    weights=weights,
                )
                errors.append([float(error.max()) for error in solution.errors(codes)])
                bounds.append(solution.bounds)
            rows.append(
                {
                    "method": method,
                    "delta": delta,
                    "sparsity": sparsity,
                    "mu": [mu for mu, _ in found],
                    "depths": list(depths),
                    "errors": errors,
                    "bounds": bounds,
                }
            )
    return rows


# --- stability --------------------------------------------------------------------------------------------------------


def rulers(rows: int, columns: int) -> Tensor:
    """Shifts of two Golomb rulers of four marks, which have one mark in common at most: mutual coherence 1/4."""
    D = torch.zeros(rows, 2 * rows, dtype=torch.float64)
    places = torch.arange(rows)
    for number, marks in enumerate(((0, 1, 4, 6), (0, 8, 17, 29))):
        for mark in marks:
            D[(places + mark) % rows, places + number * rows] = 0.5
    return D[:, :columns]


def stability(rows: int, noise: float, trials: int, seed: int) -> dict[str, Any]:
    """Errors of codes that explain noisy signals exactly, the noise being such that there are any, and the bounds.

    Three layers with 8, 2 and 1 non-zeros. The other codes are the true ones with the deepest changed, on its support
    or beside it, so that the noise lies in the model.
    """
    generator = torch.Generator().manual_seed(seed)
    first = spikes_and_hadamard(rows)
    second = rulers(2 * rows, 2 * rows + 20)
    dictionaries = [first, second, graph_dictionary(2 * rows + 20, 2 * rows + 40, 4, seed)]
    deepest = sparse_codes(trials, 2 * rows + 40, 1, generator)
    other = torch.where(torch.rand(trials, 1, generator=generator) < 0.5, deepest.roll(1, dims=1), deepest * 1.5)
    differences = [deepest - other]
    for D in dictionaries[:0:-1]:
        differences.insert(0, differences[0] @ D.T)
    size = (differences[0] @ first.T).norm(dim=1, keepdim=True)
    # Both codes scaled, so that the noise that leads from the one to the other is as large as allowed.
    measured = [float((x * noise / size).norm(dim=1).max()) for x in differences]
    lambdas = [8, 2, 1]
    return {
        "lambdas": lambdas,
        "mu": [theory.mutual_coherence(D) for D in dictionaries],
        "noise": noise,
        "measured": measured,
        "bound": theory.noise_stability_bound(noise, lambdas, dictionaries),
        "earlier": theory.earlier_stability_bounds(noise, lambdas, dictionaries),
    }


# --- activations ------------------------------------------------------------------------------------------------------


def leaky(beta: float, slope: float) -> Callable[[Tensor], Tensor]:
    """relu with the slope ``slope`` below 0, down to -beta: Lipschitz constant max(1, slope)."""
    return lambda v: torch.where(v > 0, v, (slope * v).clamp(min=-beta))


def scaled(activation: Callable[[Tensor], Tensor], beta: float) -> Callable[[Tensor], Tensor]:
    """v -> t rho(v / t) with t such that it is within beta of relu: the same shape and Lipschitz constant."""
    v = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    # The grid misses the maximum by less than its step squared.
    t = beta / (float((activation(v) - F.relu(v)).abs().max()) + 1e-6)
    return lambda u: t * activation(u / t)


SHAPES = {"ELU": F.elu, "SiLU": F.silu, "Mish": F.mish, "GELU": F.gelu}


def errors_against_activation(
    betas: Sequence[float], slopes: Sequence[float], iterations: int, count: int, seed: int
) -> dict[str, Any]:
    """Errors with other activations: of networks certified for their beta, and of one certified for relu.

    The first are under their bound whatever the slope L. The second has thresholds that fall to 0, where a small slope
    leaks less: |T_rho(u)| <= 2 min(beta, L |u|).
    """
    generator = torch.Generator().manual_seed(seed)
    D = torch.randn(40, 48, generator=generator, dtype=torch.float64)
    D = D / D.norm(dim=0)
    mu, W = theory.generalized_coherence(D)
    s = math.ceil(theory.uniqueness_bound(mu)) - 2
    codes = sparse_codes(count, 48, s, generator)
    y = codes @ D.T

    def error(network: LISTALinear, rho: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return float((theory.lista_with_activation(network, rho)(y) - codes).norm(dim=1).max())

    options = {"B": 1.0, "s": s, "iterations": iterations, "W": W}
    plain, exact = theory.certified_lista(D, **options)
    certified: dict[str, list[float]] = {name: [] for name in (*SHAPES, "leaky, L = 1")}
    bounds = []
    for beta in betas:
        network, bound = theory.certified_lista(D, beta=beta, **options)
        bounds.append(float(bound[-1]))
        for name, shape in SHAPES.items():
            certified[name].append(error(network, scaled(shape, beta)))
        certified["leaky, L = 1"].append(error(network, leaky(beta, 1.0)))
    against_slope = [[error(plain, leaky(beta, slope)) for slope in slopes] for beta in betas]
    return {
        "betas": list(betas),
        "slopes": list(slopes),
        "mu": mu,
        "s": s,
        "iterations": iterations,
        "certified": certified,
        "bounds": bounds,
        "relu": [error(plain, F.relu), float(exact[-1])],
        "against_slope": against_slope,
    }


# --- realisation as a CNN ---------------------------------------------------------------------------------------------


def network_sizes(widths: Sequence[int], kernels: Sequence[int], iterations: int) -> list[dict[str, Any]]:
    """Depth and weights of LISTA-CP as a CNN, d codes of d / 2 numbers, with the orders that they should be of."""
    rows = []
    for d, kernel in itertools.product(widths, kernels):
        m = d // 2
        layer = LISTALinear(m, d, iterations)
        size = theory.network_size(theory.lista_to_cnn(layer, kernel))
        rows.append(
            {
                "d": d,
                "m": m,
                "kernel": kernel,
                "depth": size.depth,
                "weights": size.weights,
                "nonzeros": size.nonzeros,
                "depth_order": iterations * math.log(d + m, kernel),
                "weights_order": iterations * (d + m) ** 2,
            }
        )
    return rows


# --- reconstruction: MSD-CSC against ML-CSC ---------------------------------------------------------------------------


def class_signals(classes: int, length: int, generator: torch.Generator) -> Tensor:
    """One signal of each class, (classes, 1, length): three smooth bumps and a step at places of the class's own."""
    place = torch.arange(length)
    centres = length * torch.rand(classes, 3, 1, generator=generator)
    widths = 2 + 6 * torch.rand(classes, 3, 1, generator=generator)
    heights = torch.randn(classes, 3, 1, generator=generator)
    bumps = (heights * torch.exp(-(((place - centres) / widths) ** 2) / 2)).sum(dim=1)
    edges = length * torch.rand(classes, 1, generator=generator)
    steps = torch.randn(classes, 1, generator=generator) * (place >= edges)
    return (bumps + steps).unsqueeze(1)


def dictionaries_1d(
    channels: Sequence[int], kernel: int, mixed: bool, generator: torch.Generator
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Random convolutional dictionaries of unit atoms with their geometry, layer by layer.

    ML-CSC: stride 2 in every layer. MSD-CSC (``mixed``): stride 1, dilation 1, 2, 3, ..., and the identity among the
    atoms, D = [I, F^T], so that the input is part of every code.
    """
    made, signal = [], 1
    for j, count in enumerate(channels):
        F_ = torch.randn(count, signal, kernel, generator=generator)
        F_ = F_ / F_.flatten(1).norm(dim=1).reshape(-1, 1, 1)
        if mixed:
            identity = torch.zeros(signal, signal, kernel)
            identity[torch.arange(signal), torch.arange(signal), kernel // 2] = 1.0
            made.append((torch.cat([identity, F_]), {"padding": (j + 1) * (kernel // 2), "dilation": j + 1}))
        else:
            made.append((F_, {"padding": kernel // 2, "stride": 2}))
        signal = len(made[-1][0])
    return made


def reconstruction_failures(
    classes: int, length: int, channels: Sequence[int], kernel: int, beta: float, iterations: Sequence[int], seed: int
) -> dict[str, Any]:
    """The share of coordinates with |(S_D G - X)_j| > 2 beta in each layer, G after so many iterations of ISTA.

    X of a layer is the code of the layer before after the most iterations.
    """
    generator = torch.Generator().manual_seed(seed)
    signals = class_signals(classes, length, generator)
    failures: dict[str, list[list[float]]] = {}
    for name, mixed in (("ML-CSC", False), ("MSD-CSC", True)):
        X, failures[name] = signals, []
        for D, geometry in dictionaries_1d(channels, kernel, mixed, generator):
            shares, G = [], None
            for before, count in zip([0, *iterations], iterations, strict=False):
                G = functional.ista(X, D, beta, iterations=count - before, x0=G, **geometry)
                missed = (functional.synthesis(G, D, X.shape[2:], **geometry) - X).abs() > 2 * beta
                shares.append(float(missed.float().mean()))
            failures[name].append(shares)
            X = G
    return {"iterations": list(iterations), "beta": beta, "failures": failures}
