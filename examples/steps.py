"""The steps of the demo: each does its part in its own folder and returns its results as plain data for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cases import CASES
from benchmarks.run import measure, torch_threads
from dsc_ops import functional
from examples import ista
from examples.data import digits as mnist
from examples.data import photographs, sampling
from examples.networks import Denoiser, LeNet5
from examples.training import Learner, fit

SIGMA = 25 / 255


@dataclass(frozen=True)
class DenoiseSettings:
    """Sizes of the first step."""

    iterations: int = 3
    theta: float = 0.1  # of the start, about sigma
    crop: int = 48
    batch: int = 4
    steps_per_epoch: int = 100
    epochs: int = 15
    learning_rate: float = 1.25e-3
    lams: tuple[float, ...] = (0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3)  # among which ISTA chooses
    tuning_crop: int = 96  # of the training photographs
    test_crop: int | None = None  # of the test photographs; None is all of them


@dataclass(frozen=True)
class DigitsSettings:
    """Sizes of the second step."""

    gammas: tuple[float, ...] = (0.0, 0.05)
    runs: int = 3
    test_fraction: float = 0.2
    batch: int = 128
    epochs: int = 15
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class TimingSettings:
    """Sizes of the third step: the cases with their batch."""

    batches: tuple[tuple[str, int], ...] = (("denoise-gray", 1), ("stem-cifar", 16), ("signal", 2))
    iterations: int = 10
    density: float = 0.1
    repeats: int = 7


def centre(picture: Tensor, size: int | None) -> Tensor:
    """The middle size x size pixels; the picture itself for None."""
    return picture if size is None else photographs.middle(picture, size)


def denoise(settings: DenoiseSettings, seed: int, folder: Path) -> dict[str, Any]:
    """Train a LISTAConv denoiser on photographs and compare it with ISTA on photographs that neither has seen."""
    lightning.seed_everything(seed, verbose=False)
    training = [photographs.photograph(name) for name in photographs.TRAINING_PHOTOGRAPHS]
    network = Denoiser(settings.iterations, settings.theta)
    start = network.code.dictionary.detach().clone()
    loader = DataLoader(
        photographs.NoisyCrops(training, settings.crop, SIGMA),
        batch_size=settings.batch,
        sampler=sampling.FreshSeeds(settings.steps_per_epoch * settings.batch, seed),
    )
    learner = Learner(network, F.mse_loss, partial(torch.optim.Adam, lr=settings.learning_rate))
    losses = fit(learner, loader, settings.epochs, folder, "denoiser")
    torch.save(network.state_dict(), folder / "weights.pt")

    test = [
        centre(photographs.photograph(name), settings.test_crop).unsqueeze(0) for name in photographs.TEST_PHOTOGRAPHS
    ]
    noisy = [photographs.add_noise(picture, SIGMA, seed + 1000 + index) for index, picture in enumerate(test)]
    with torch.no_grad():
        codes = [network.code(picture - picture.mean()) for picture in noisy]
        found = {"clean": test, "noisy": noisy, "network": [network(picture) for picture in noisy]}
    print("ISTA: tuning lambda and the number of iterations on the training photographs ...", flush=True)
    tuning = torch.stack([centre(picture, settings.tuning_crop) for picture in training])
    table = []
    for rival in ista.rivals(network):
        tuning_noisy = photographs.add_noise(tuning, SIGMA, seed + 999)
        for choice in ista.tune(rival, tuning_noisy, tuning, settings.lams, settings.iterations):
            pictures = [list(ista.pictures(rival, picture, choice.lam, choice.iterations))[-1] for picture in noisy]
            row = {"name": rival.name, "parameters": rival.atoms.numel(), **asdict(choice)}
            row["psnr"] = list(map(ista.psnr, pictures, test))
            table.append(row)
            if row is max(table, key=lambda entry: fmean(entry["psnr"])):
                found["ista"] = pictures
    found = {name: [picture[0] for picture in batch] for name, batch in found.items()}
    atoms = {"start": start, "learned": network.code.dictionary.detach().clone()}
    torch.save({"pictures": found, "atoms": atoms}, folder / "pictures.pt")
    return {
        "training_photographs": list(photographs.TRAINING_PHOTOGRAPHS),
        "photographs": list(photographs.TEST_PHOTOGRAPHS),
        "sigma": SIGMA,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "losses": losses,
        "psnr": {name: list(map(ista.psnr, found[name], found["clean"])) for name in ("noisy", "ista", "network")},
        "ista": table,
        "density": [float(functional.density(code)) for code in codes],
    }


def digits(settings: DigitsSettings, seed: int, folder: Path) -> dict[str, Any]:
    """Train LeNet-5 on digits with and without the l1 penalty on its convolutional blocks."""
    images, labels = mnist.digits()
    training, test = mnist.split_digits(labels, settings.test_fraction, seed)
    optimizer = partial(
        torch.optim.SGD, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    runs = []
    for number in range(settings.runs):
        for gamma in settings.gammas:
            lightning.seed_everything(seed + number, verbose=False)
            network = LeNet5(in_channels=1, size=28, classes=mnist.DIGIT_CLASSES)
            loader = DataLoader(
                TensorDataset(images[training], labels[training]),
                batch_size=settings.batch,
                sampler=sampling.Shuffled(len(training), seed + number),
                drop_last=True,
            )
            learner = Learner(network, F.cross_entropy, optimizer, penalised=LeNet5.BLOCKS, gamma=gamma)
            name = f"gamma {gamma:g} run {number + 1}"
            with torch_threads(1):  # the network is too small to gain from more
                losses = fit(learner, loader, settings.epochs, folder / name.replace(" ", "-"), f"LeNet-5 {name}")
            with torch.no_grad():
                correct = network(images[test]).argmax(dim=1) == labels[test]
            accuracy, density = float(correct.float().mean()), learner.penalty.density()
            runs.append({"gamma": gamma, "accuracy": accuracy, "density": density, "losses": losses})
    return {
        "layers": list(LeNet5.BLOCKS),
        "training_digits": len(training),
        "test_digits": len(test),
        "runs": runs,
    }


def timing(settings: TimingSettings, seed: int, folder: Path) -> dict[str, Any]:
    """Time the fused K-step LISTA with gradients against plain PyTorch; see :mod:`benchmarks`."""
    cases = [CASES[name].scaled(batch) for name, batch in settings.batches]
    options = {"density": settings.density, "iterations": settings.iterations, "repeats": settings.repeats}
    return {"results": [measure(case, mode="training", **options) for case in cases]}
