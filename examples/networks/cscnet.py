"""CSCNet: a denoiser of strided convolutional sparse coding, averaged over all shifts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsc_ops import LISTAConv, functional


class CSCNet(nn.Module):
    """CSCNet as in Simon, Elad (NeurIPS 2019): noisy grey pictures (N, 1, H, W) to clean ones.

    With large strides a code has few atoms for each pixel, but depends on where the picture lies on the grid of atoms:
    it is moved by each of stride x stride shifts, and the results are averaged. On each of them, from zero,

        g <- T_tau(g - B(A g - y)),   result = C g

    which is :class:`dsc_ops.LISTAConv` with dictionary A and analysis B. All three start as the same random atoms with
    L = 1; pictures are continued by their mirror images.

    Args:
        filters, kernel, stride: of the dictionaries.
        unfoldings: K, the first step from zero counted.
        tau: threshold of every filter at the start.
    """

    # Whose density is logged.
    FEATURES = ("code",)

    def __init__(
        self, filters: int = 175, kernel: int = 11, stride: int = 8, *, unfoldings: int = 12, tau: float = 0.01
    ):
        super().__init__()
        if stride > kernel:
            raise ValueError(f"CSCNet: stride is {stride}, it takes at most the kernel's {kernel}")
        atoms = torch.randn(filters, 1, kernel, kernel)
        atoms = atoms / functional.lipschitz(atoms, 8 * kernel, stride=stride).sqrt()
        self.code = LISTAConv.from_dictionary(atoms, unfoldings, stride=stride, padding=0, theta=tau, untied=False)
        self.decoder = nn.Parameter(self.code.dictionary.detach().clone())
        self.kernel, self.stride = kernel, stride

    def forward(self, noisy: Tensor) -> Tensor:
        height, width = noisy.shape[2:]
        # The grid's size with the picture on it at any shift, at least a pixel away from the left and the upper edge.
        grid = [self._grid(length) for length in (height, width)]
        more = [size - length - 1 for size, length in zip(grid, (height, width), strict=True)]
        wide = F.pad(noisy, (self.stride, more[1], self.stride, more[0]), mode="reflect")
        shifts = [(row, column) for row in range(self.stride) for column in range(self.stride)]
        windows = [wide[:, :, row : row + grid[0], column : column + grid[1]] for row, column in shifts]
        codes = self.code(torch.cat(windows))
        pictures = functional.synthesis(codes, self.decoder, tuple(grid), stride=self.stride)
        total = torch.zeros_like(noisy)
        for (row, column), picture in zip(shifts, pictures.chunk(len(shifts)), strict=True):
            top, left = self.stride - row, self.stride - column
            total = total + picture[:, :, top : top + height, left : left + width]
        return total / len(shifts)

    def _grid(self, length: int) -> int:
        """The smallest size that atoms on the grid cover, for a picture of this length and any shift."""
        steps = -(-(length + self.stride - self.kernel) // self.stride)
        return max(steps, 0) * self.stride + self.kernel
