"""ImageNet: pictures in a folder for each class, decoded as they are needed, as augmented batches.

ImageNet Large Scale Visual Recognition Challenge, O. Russakovsky et al., IJCV 2015. Your files; nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from examples.data.files import ROOT
from examples.data.sampling import batch_loader, first_seed

# Of the training pictures, in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def folder(root: Path, part: str) -> ImageFolder:
    """The pictures of a part; a sentence ends the program when they are not there."""
    try:
        return ImageFolder(root / part)
    except FileNotFoundError as error:
        raise SystemExit(
            f"ImageNet is not in {root} ({error}): put there the folders train and val, in each a folder for each "
            "class with its pictures"
        ) from None


class Pictures(Dataset):
    """Whole batches of normalised pictures (b, 3, size, size) and labels (b,), by the indices of sampling.Batches.

    With a seed, random crops of 8 to 100 % of a picture, mirrored or not, which depend on the seed, the epoch and the
    picture alone; else the middle 7/8 of each.
    """

    def __init__(self, files: ImageFolder, size: int, seed: int | None, limit: int | None):
        self.files, self.seed, self.length = files, seed, min(len(files), limit or len(files))
        crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        middle = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
        self.cut = v2.Compose([v2.PILToTensor(), *(middle if seed is None else crop)])
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, batch: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        epoch, indices = batch
        pictures, labels = zip(*(self.one(epoch, index) for index in indices.tolist()), strict=True)
        return self.normalise(torch.stack(pictures)), torch.tensor(labels)

    def one(self, epoch: int, index: int) -> tuple[Tensor, int]:
        picture, label = self.files[index]
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.default_generator.manual_seed(first_seed(self.seed) + epoch * len(self) + index)
            return self.cut(picture), label


class ImageNet(lightning.LightningDataModule):
    """ImageNet: training batches with random crops and flips, and the validation pictures.

    Args:
        root: folder with ``train`` and ``val``, in each a folder for each class; runs/data/imagenet for None.
        batch_size: of all processes together.
        seed: of the order and the augmentation, which also depend on the epoch.
        size: height and width of the crops.
        workers: processes that decode; what they make does not depend on their number.
        limit: takes only so many pictures of each part; None takes all.
    """

    label = "ImageNet"

    def __init__(
        self,
        root: Path | None = None,
        batch_size: int = 512,
        seed: int = 0,
        size: int = 224,
        workers: int = 8,
        limit: int | None = None,
    ):
        super().__init__()
        self.root, self.batch_size, self.seed = Path(root or ROOT / "imagenet"), batch_size, seed
        self.size, self.workers, self.limit = size, workers, limit

    def setup(self, stage: str | None = None) -> None:
        self.training, self.test = (
            Pictures(folder(self.root, part), self.size, seed, self.limit)
            for part, seed in (("train", self.seed), ("val", None))
        )

    def train_dataloader(self) -> DataLoader:
        return batch_loader(self.training, self.batch_size, self.trainer, self.workers)

    def val_dataloader(self) -> DataLoader:
        return batch_loader(self.test, self.batch_size, self.trainer, self.workers)

    test_dataloader = val_dataloader
