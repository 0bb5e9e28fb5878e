"""Scikit-image's photographs, which come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import skimage
import torch
from skimage.color import rgb2gray
from skimage.io import imread
from skimage.util import img_as_float32
from torch import Tensor
from torch.utils.data import Dataset

# Files of scikit-image's wheel (its other photographs are fetched on first use). The split is by photograph.
TRAINING_PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "clock_motion.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
)
TEST_PHOTOGRAPHS = ("camera.png", "chelsea.png", "coffee.png", "rocket.jpg")


def photograph(name: str, *, colour: bool = False) -> Tensor:
    """A photograph of scikit-image by its file name: (1, H, W), or (3, H, W) with ``colour``, float32 in [0, 1]."""
    image = imread(Path(skimage.__file__).parent / "data" / name)
    if colour and image.ndim == 2:
        raise ValueError(f"photograph: name is {name!r}, which is grey; colour=True takes a colour photograph")
    if colour:
        return torch.from_numpy(img_as_float32(image)).permute(2, 0, 1).contiguous()
    grey = rgb2gray(image) if image.ndim == 3 else image
    return torch.from_numpy(img_as_float32(grey)).unsqueeze(0)


def add_noise(clean: Tensor, sigma: float, seed: int) -> Tensor:
    """White Gaussian noise of standard deviation sigma, the same for the same seed; not clipped to [0, 1]."""
    return clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


class NoisyCrops(Dataset):
    """Pairs (noisy, clean) of random crops (1, size, size), mirrored and turned at random; the index is the seed."""

    def __init__(self, photographs: Sequence[Tensor], size: int, sigma: float):
        self.photographs, self.size, self.sigma = list(photographs), size, sigma

    def __getitem__(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        picture = self.photographs[draw(len(self.photographs))]
        top, left = (draw(length - self.size + 1) for length in picture.shape[1:])
        clean = picture[:, top : top + self.size, left : left + self.size]
        clean = torch.rot90(clean, draw(4), (1, 2))
        clean = (clean.flip(2) if draw(2) else clean).contiguous()
        return clean + self.sigma * torch.randn(clean.shape, generator=generator), clean


def middle(picture: Tensor, size: int) -> Tensor:
    """The middle size x size pixels of a picture (C, H, W)."""
    top, left = ((length - size) // 2 for length in picture.shape[1:])
    return picture[:, top : top + size, left : left + size].contiguous()
