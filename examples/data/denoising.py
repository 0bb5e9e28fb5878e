"""Noisy photographs for denoisers."""

from __future__ import annotations

import lightning
from torch.utils.data import DataLoader

from examples.data import photographs
from examples.data.sampling import FreshSeeds


class NoisyPhotographs(lightning.LightningDataModule):
    """Noisy crops of the training photographs with the clean ones, and the test photographs, noisy, for validation.

    Args:
        sigma: standard deviation of the noise; pictures are in [0, 1].
        crop: height and width of the crops.
        batch_size: crops that are taken together.
        steps: batches of an epoch.
        test_crop: height and width of the middle of the test photographs that is taken.
        seed: of crops and noise.
    """

    label = "photographs of scikit-image"

    def __init__(
        self,
        sigma: float = 25 / 255,
        crop: int = 128,
        batch_size: int = 1,
        steps: int = 800,
        test_crop: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        self.sigma, self.crop, self.batch_size, self.steps = sigma, crop, batch_size, steps
        self.test_crop, self.seed = test_crop, seed

    def setup(self, stage: str | None = None) -> None:
        self.training = photographs.NoisyCrops(
            [photographs.photograph(name) for name in photographs.TRAINING_PHOTOGRAPHS], self.crop, self.sigma
        )
        clean = [
            photographs.middle(photographs.photograph(name), self.test_crop) for name in photographs.TEST_PHOTOGRAPHS
        ]
        self.test = [
            (photographs.add_noise(picture, self.sigma, index), picture) for index, picture in enumerate(clean)
        ]

    def train_dataloader(self) -> DataLoader:
        seeds = FreshSeeds(self.steps * self.batch_size, self.seed)
        return DataLoader(self.training, self.batch_size, sampler=seeds)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test)
