"""A denoiser of convolutional LISTA, and the cosines that it starts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import dsc_ops


def dct_atoms(frequencies: int, kernel: int) -> Tensor:
    """Two-dimensional cosines of unit norm, ``frequencies`` an axis (overcomplete when more than ``kernel``), DC first.

    Shape (frequencies**2, 1, kernel, kernel); all but the first have zero mean.
    """
    position = torch.arange(kernel) + 0.5
    waves = torch.stack([torch.cos(math.pi * f * position / frequencies) for f in range(frequencies)])
    waves[1:] -= waves[1:].mean(dim=1, keepdim=True)
    waves = waves / waves.norm(dim=1, keepdim=True)
    return torch.einsum("ai,bj->abij", waves, waves).reshape(-1, 1, kernel, kernel)


class Denoiser(nn.Module):
    """Grey pictures (N, 1, H, W) to the same: codes of the picture less its mean, decoded by their own dictionary.

    The start is K steps of ISTA on the overcomplete cosine dictionary, scaled so that L = 1: dictionary and analysis
    are then the same tensor, and one learning rate suits both.

    Args:
        iterations: K.
        theta: threshold at the start, for atoms of unit norm (scaled with the dictionary).
    """

    def __init__(self, iterations: int, theta: float, *, frequencies: int = 8, kernel: int = 7):
        super().__init__()
        # Every position at which an atom meets the picture has a code: no pixel is short of atoms at the border.
        padding = kernel - 1
        atoms = dct_atoms(frequencies, kernel)
        scale = dsc_ops.functional.lipschitz(atoms, 8 * kernel, padding=padding).sqrt()
        self.code = dsc_ops.LISTAConv.from_dictionary(
            atoms / scale, iterations, padding=padding, theta=float(theta / scale)
        )

    def forward(self, noisy: Tensor) -> Tensor:
        mean = noisy.mean(dim=(1, 2, 3), keepdim=True)
        return mean + self.code.decode(self.code(noisy - mean))
