"""Salient object detection: pictures with masks in the folders of DUTS-TR, DUTS-TE and DUT-OMRON, as batches.

DUTS: Learning to Detect Salient Objects with Image-level Supervision, L. Wang et al., CVPR 2017.
DUT-OMRON: Saliency Detection via Graph-based Manifold Ranking, C. Yang et al., CVPR 2013.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from examples.data.files import ROOT, made
from examples.data.sampling import batch_loader, epoch_generator, flip
from examples.metrics import MaskScores

# Folders of pictures and of masks, as they are published.
LAYOUTS = {
    "DUTS-TR": ("DUTS-TR-Image", "DUTS-TR-Mask"),
    "DUTS-TE": ("DUTS-TE-Image", "DUTS-TE-Mask"),
    "DUT-OMRON": ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
}
COMPOSITES = "COMPOSITES.txt"  # lies in a folder that has DUTS's layout but not its pictures


def layout_of(folder: Path) -> str:
    """The name of the layout that a folder has; a sentence ends the program when it has none."""
    for name, parts in LAYOUTS.items():
        if all((folder / part).is_dir() for part in parts):
            return name
    wanted = ", or ".join(" and ".join(parts) for parts in LAYOUTS.values())
    raise SystemExit(
        f"{folder} has no salient objects: put there the folders {wanted}; or make composites by "
        f"python -m examples.data saliency"
    )


def label_of(folder: Path) -> str:
    """What results on a folder are called: DUTS-TR, DUTS-TE, DUT-OMRON, or the same with "composites, not" before."""
    name = layout_of(folder)
    return f"composites, not {name}" if (folder / COMPOSITES).exists() else name


def pairs(folder: Path) -> list[tuple[Path, Path]]:
    """The files of pictures and masks, in the order of their names."""
    pictures, masks = (
        {path.stem: path for path in sorted((folder / part).glob(f"[!.]*.{suffix}"))}
        for part, suffix in zip(LAYOUTS[layout_of(folder)], ("jpg", "png"), strict=True)
    )
    alone = sorted(pictures.keys() ^ masks.keys())
    if alone or not pictures:
        raise SystemExit(
            f"{folder} is not whole: "
            + (f"{len(alone)} names have a picture or a mask alone, such as {alone[0]}" if alone else "it is empty")
            + "; unpack its archives there again"
        )
    return [(pictures[name], masks[name]) for name in pictures]


def read_pair(files: tuple[Path, Path], size: int) -> np.ndarray:
    """A picture and its mask, resized: uint8 (4, size, size), the mask last and 0 or 255."""
    planes = np.empty((4, size, size), np.uint8)
    for file, mode, part in zip(files, ("RGB", "L"), (planes[:3], planes[3:]), strict=True):
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert(mode).resize((size, size), Image.Resampling.BILINEAR))
        except OSError as error:
            raise SystemExit(f"{file} cannot be read ({error}): unpack its archive there again") from None
        part[:] = pixels.reshape(size, size, -1).transpose(2, 0, 1)
    planes[3] = np.where(planes[3] > 127, 255, 0)
    return planes


def load(folder: Path, size: int, root: Path | None = None) -> Tensor:
    """All pairs of a folder, (N, 4, size, size) in uint8 as by :func:`read_pair`, mapped from a file.

    Args:
        folder: in one of the published layouts.
        size: to which pictures and masks are resized.
        root: where the file is, which is made when it is missing or the folder has changed; runs/data for None.
    """
    files = pairs(folder)
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for pair in files for path in pair]
    key = hashlib.sha256(repr(states).encode()).hexdigest()[:12]
    cached = (root or ROOT) / f"{folder.name}-{size}-{key}.npy"

    def resize(unfinished: Path) -> None:
        planes = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(files), 4, size, size))
        with ThreadPoolExecutor() as threads:
            found = threads.map(lambda pair: read_pair(pair, size), files)
            for index, pair in enumerate(tqdm(found, f"resizing {folder.name}", len(files), unit="pair")):
                planes[index] = pair
        planes.flush()

    # Private pages: torch wants memory that may be written to.
    return torch.from_numpy(np.load(made(cached, resize), mmap_mode="c"))


class Pairs(Dataset):
    """Whole batches of pictures (b, 3, s, s) in [-1, 1] and masks (b, 1, s, s) of 0 and 1, both float32.

    With a seed they are flipped at random, which depends on the seed, the epoch and the pair alone.
    """

    def __init__(self, planes: Tensor, seed: int | None):
        self.planes, self.seed = planes, seed

    def __len__(self) -> int:
        return len(self.planes)

    def __getitem__(self, batch: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        epoch, indices = batch
        planes = self.planes.index_select(0, indices)
        if self.seed is not None:
            flips = torch.randint(2, (len(self),), generator=epoch_generator(self.seed, epoch, stream=1))
            planes = flip(planes, flips[indices])
        return planes[:, :3] / 127.5 - 1, planes[:, 3:] / 255


class Saliency(lightning.LightningDataModule):
    """Salient objects: training pairs with random flips, and the pairs of one or more test sets, a loader each.

    Args:
        train: folder with the layout of DUTS-TR; None takes the composites of ``python -m examples.data saliency``.
        test: folders with the layouts of DUTS-TE or DUT-OMRON; None takes the composites.
        root: folder of the composites and of the resized pairs; runs/data for None.
        size: to which pictures and masks are resized.
        batch_size: of all processes together.
        seed: of the order and the flips, which also depend on the epoch.
        limit: takes only so many pairs of each set; None takes all.

    ``label`` and ``test_labels`` name the sets as results have to name them: those on composites are not DUTS.
    """

    def __init__(
        self,
        train: Path | None = None,
        test: Sequence[Path] | None = None,
        root: Path | None = None,
        size: int = 128,
        batch_size: int = 4,
        seed: int = 0,
        limit: int | None = None,
    ):
        super().__init__()
        self.root = Path(root or ROOT)
        self.train = Path(train or self.root / "composites" / "DUTS-TR")
        self.tests = [Path(folder) for folder in test or [self.root / "composites" / "DUTS-TE"]]
        self.size, self.batch_size, self.seed, self.limit = size, batch_size, seed, limit

    @property
    def label(self) -> str:
        return label_of(self.train)

    @property
    def test_labels(self) -> list[str]:
        return [label_of(folder) for folder in self.tests]

    def prepare_data(self) -> None:
        for folder in (self.train, *self.tests):
            load(folder, self.size, self.root)

    def setup(self, stage: str | None = None) -> None:
        self.training_planes = load(self.train, self.size, self.root)[: self.limit]
        self.test_planes = [load(folder, self.size, self.root)[: self.limit] for folder in self.tests]

    def prior(self) -> list[dict[str, float]]:
        """For each test set, the scores of the mean training mask, cut at one half, as the guess for every picture.

        A network that has learnt anything from the pictures is above them.
        """
        guess = self.training_planes[:, 3].float().mean(0) > 127.5
        found = []
        for planes in self.test_planes:
            scores = MaskScores()
            scores.update(guess.expand(len(planes), -1, -1), planes[:, 3])
            found.append({name: float(value) for name, value in scores.compute().items()})
        return found

    def train_dataloader(self) -> DataLoader:
        return batch_loader(Pairs(self.training_planes, self.seed), self.batch_size, self.trainer)

    def val_dataloader(self) -> list[DataLoader]:
        return [batch_loader(Pairs(planes, None), self.batch_size, self.trainer) for planes in self.test_planes]

    test_dataloader = val_dataloader
