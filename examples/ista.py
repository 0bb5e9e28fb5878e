"""The rivals of the trained denoiser: ISTA with several dictionaries, tuned on the training photographs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from dsc_ops import functional
from examples.networks import Denoiser, dct_atoms


@dataclass(frozen=True)
class Rival:
    """A dictionary for ISTA: atoms of unit norm, those of them that are not thresholded, and the step 1 / L."""

    name: str
    atoms: Tensor
    free: list[int]
    step: float


@dataclass(frozen=True)
class Choice:
    """lambda and the number of iterations."""

    lam: float
    iterations: int


def rivals(network: Denoiser) -> list[Rival]:
    """Two fixed dictionaries of the size of the network's, one with more parameters than the network, and its own.

    The constant cosine is not thresholded, which suits photographs; the learned dictionary has no such atom.
    """
    learned = network.code.dictionary.detach()
    learned = learned / learned.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    kernel = learned.shape[-1]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    large = math.ceil(parameters**0.25)
    return [
        cosines(kernel, kernel),
        cosines(round(len(learned) ** 0.5), kernel),
        cosines(large, large),
        rival("the network's learned atoms", learned, free=[]),
    ]


def cosines(frequencies: int, kernel: int) -> Rival:
    atoms = dct_atoms(frequencies, kernel)
    return rival(f"{len(atoms)} cosines of {kernel}x{kernel}", atoms, free=[0])


def rival(name: str, atoms: Tensor, free: list[int]) -> Rival:
    kernel = atoms.shape[-1]
    return Rival(name, atoms, free, 1 / float(functional.lipschitz(atoms, 8 * kernel, padding=kernel - 1)))


def psnr(picture: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB for pictures of range 1."""
    return float(-10 * (picture - clean).square().mean().log10())


@torch.no_grad()
def pictures(rival: Rival, noisy: Tensor, lam: float, iterations: int) -> Iterator[Tensor]:
    """The pictures after 1, 2, ... iterations of ISTA on noisy (N, 1, H, W); mean and border as in the network."""
    padding = rival.atoms.shape[-1] - 1
    lams = torch.full((len(rival.atoms),), lam)
    lams[rival.free] = 0
    level = noisy.mean(dim=(1, 2, 3), keepdim=True)
    codes, options = None, {"iterations": 1, "step": rival.step, "padding": padding}
    for _ in range(iterations):
        codes = functional.ista(noisy - level, rival.atoms, lams, x0=codes, **options)
        yield level + functional.synthesis(codes, rival.atoms, noisy.shape[2:], padding=padding)


def tune(rival: Rival, noisy: Tensor, clean: Tensor, lams: Sequence[float], iterations: int) -> list[Choice]:
    """The best lambda for this many iterations, and, where fewer are better, the best of all choices."""
    scores = {}
    for lam in lams:
        for count, found in enumerate(pictures(rival, noisy, lam, iterations), start=1):
            scores[Choice(lam, count)] = fmean(map(psnr, found, clean))
    full = max((choice for choice in scores if choice.iterations == iterations), key=scores.__getitem__)
    return list(dict.fromkeys([full, max(scores, key=scores.__getitem__)]))
