"""Robust inference of a trained SDNet (Dai et al., NeurIPS 2022, Algorithm 1): `python -m examples.robust` runs it."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import instantiate_class
from matplotlib.figure import Figure
from skimage.util import random_noise
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.machine import commit, machine, write_whole
from dsc_ops.layers.csc import CSCConv, adapted_lambda, fit_lambda
from examples.data import cifar
from examples.pictures import BLUE, INK, new_figure
from examples.training import step_of

LAMBDAS = [round(0.1 * step, 1) for step in range(1, 15)]
# Of each corruption, as in the paper; pictures are in [0, 1].
LEVELS = {
    "gaussian": [round(0.02 * step, 2) for step in range(1, 11)],  # standard deviation
    "shot": list(range(60, 5, -6)),  # photons of a white pixel
    "speckle": [round(0.1 * step, 1) for step in range(1, 7)],  # standard deviation of the factor
    "impulse": [round(0.03 * step, 2) for step in range(1, 10)],  # fraction of black or white values
}
# Largest perturbation, step, in [0, 1]; each of ten steps.
ATTACKS = {"PGD L_inf 8/255": ("PGD", 8 / 255, 2 / 255), "PGD L2 0.5": ("PGDL2", 0.5, 0.1)}

Corruption = Callable[[Tensor, float], Tensor]
Batches = list[tuple[Tensor, Tensor]]


# ---------------------------------------------------------------------------------------------------------- pictures


def corruption(name: str) -> Corruption:
    """Pictures in [0, 1] and a level to corrupted pictures in [0, 1]; the same pictures get the same noise."""
    if name not in LEVELS:
        raise ValueError(f"corruption is {name!r}, it takes one of {', '.join(LEVELS)}")

    def corrupt(pictures: Tensor, level: float) -> Tensor:
        values = pictures.cpu().numpy()
        rng = np.random.default_rng(zlib.crc32(values.tobytes()))
        if name == "shot":
            noisy = np.clip(rng.poisson(values * level) / level, 0, 1)
        elif name == "impulse":
            noisy = random_noise(values, "s&p", rng=rng, amount=level)
        else:
            noisy = random_noise(values, name, rng=rng, var=level**2)
        return torch.from_numpy(noisy).to(pictures)

    return corrupt


def batches(root: Path | None, train: bool, limit: int, size: int = 250) -> Batches:
    """The first pictures of CIFAR-10, in [0, 1], with their labels."""
    pictures, labels = (part[:limit] for part in cifar.load(root, train))
    return list(zip((pictures.float() / 255).split(size), labels.split(size), strict=True))


def corrupted(loader: Iterable[tuple[Tensor, Tensor]], corrupt: Corruption, level: float) -> Batches:
    return [(corrupt(pictures, level), labels) for pictures, labels in loader]


def attacked(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], name: str) -> Batches:
    """Pictures that an attack of torchattacks on the model as it is has made of these."""
    import torchattacks

    kind, eps, alpha = ATTACKS[name]
    attack = getattr(torchattacks, kind)(model, eps=eps, alpha=alpha, steps=10)
    return [(attack(pictures, labels), labels) for pictures, labels in tqdm(loader, desc=name, leave=False)]


# ------------------------------------------------------------------------------------------------------------- model


class OnPictures(nn.Module):
    """A network for normalised pictures as one for pictures in [0, 1], which corruptions and attacks are made of."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        for name, values in (("mean", cifar.MEAN), ("std", cifar.STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network((pictures - self.mean) / self.std)


def load(run: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a run's folder in evaluation mode, and the run's record."""
    record, checkpoint = run / "run.json", run / "last.ckpt"
    for path in (record, checkpoint):
        if not path.is_file():
            sys.exit(f"{path} is not there: RUN is a folder that python -m examples.train made")
    facts = json.loads(record.read_text())
    network = instantiate_class((), facts["settings"]["model"]["init_args"]["network"])
    if not any(isinstance(module, CSCConv) for module in network.modules()):
        sys.exit(f"{run} holds a {facts['row']}, which has no CSCConv layer: its inference has no lambda to adapt")
    step_of(checkpoint)  # names a damaged one
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    prefix = "network."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return OnPictures(network).eval(), facts


@torch.no_grad()
def accuracy(model: nn.Module, loader: Batches) -> float:
    right = sum(int((model(pictures).argmax(1) == labels).sum()) for pictures, labels in loader)
    return right / sum(len(labels) for _, labels in loader)


def spread(values: Sequence[float], count: int) -> list[float]:
    """So many of the values, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[place] for place in places]


def adapt(model: nn.Module, training: Batches, test: Batches, name: str, count: int) -> dict[str, Any]:
    """Fit lambda on corrupted training pictures; accuracies on corrupted test pictures, as trained and adapted."""
    corrupt, levels = corruption(name), spread(LEVELS[name], count)
    relation = fit_lambda(model, training, corrupt, levels, LAMBDAS)
    # On the test pictures only the accuracies are read, for the figure: the relation is that of the training pictures.
    curves = fit_lambda(model, test, corrupt, levels, LAMBDAS).accuracies
    points = []
    for level in levels:
        noisy = corrupted(test, corrupt, level)
        point = {"level": level, "as_trained": accuracy(model, noisy)}
        with adapted_lambda(model, noisy, relation) as lam:
            points.append(point | {"lambda": lam, "adapted": accuracy(model, noisy)})
    line = {"slope": relation.slope, "intercept": relation.intercept, "residuals": relation.residuals}
    return {"relation": line | {"best": relation.best}, "lambdas": LAMBDAS, "accuracies": curves, "points": points}


def attack(model: nn.Module, training: Batches, test: Batches, count: int) -> dict[str, Any]:
    """Accuracies under attacks on the model as trained, and adapted by the relation of Gaussian noise."""
    relation = fit_lambda(model, training, corruption("gaussian"), spread(LEVELS["gaussian"], count), LAMBDAS)
    found = {}
    for name in ATTACKS:
        bad = attacked(model, test, name)
        point = {"as_trained": accuracy(model, bad)}
        with adapted_lambda(model, bad, relation) as lam:
            found[name] = point | {"lambda": lam, "adapted": accuracy(model, bad)}
    return found


# ------------------------------------------------------------------------------------------------------------ results


def draw(results: dict[str, Any]) -> Figure:
    """Accuracy against lambda, a panel for each corruption, a line for each level; stars are the adapted points."""
    found = results["corruptions"]
    figure, axes = new_figure(3.6 * len(found), 3, 1, len(found))
    for axis, (name, values) in zip(np.atleast_1d(axes), found.items(), strict=True):
        shades = np.linspace(0.35, 1, len(values["points"]))
        for curve, point, shade in zip(values["accuracies"], values["points"], shades, strict=True):
            axis.plot(values["lambdas"], curve, color=BLUE, alpha=shade, lw=1.5, label=f"level {point['level']:g}")
            axis.plot(point["lambda"], point["adapted"], "*", color=INK, ms=9)
        axis.set(title=name, xlabel="lambda", ylabel="accuracy on the test pictures")
        axis.legend(fontsize=7)
    return figure


def run(options: argparse.Namespace, command: str) -> list[Path]:
    """Measure, draw and write; the files. The results say by which command."""
    start = time.perf_counter()
    model, facts = load(options.run)
    training, test = (batches(options.root, train, options.limit) for train in (True, False))
    results = {"row": facts["row"], "epochs": facts["epochs"]}
    results |= {"command": command, "commit": commit(), "machine": machine()}
    results |= {"pictures": sum(len(labels) for _, labels in test), "clean": accuracy(model, test), "corruptions": {}}
    print(f"{facts['row']}, clean: {results['clean']:.2%}")
    for name in options.corruptions:
        results["corruptions"][name] = found = adapt(model, training, test, name, options.levels)
        for point in found["points"]:
            said = f"{point['as_trained']:.2%}, with lambda {point['lambda']:.2f} {point['adapted']:.2%}"
            print(f"{name} {point['level']:g}: {said}")
    if options.attacks:
        results["attacks"] = attack(model, training, test, options.levels)
        for name, point in results["attacks"].items():
            print(f"{name}: {point['as_trained']:.2%}, with lambda {point['lambda']:.2f} {point['adapted']:.2%}")
    results["hours"] = (time.perf_counter() - start) / 3600
    output, png = options.output or options.run, io.BytesIO()
    draw(results).savefig(png, format="png")
    write_whole(output / "robust.json", json.dumps(results, indent=1) + "\n")
    write_whole(output / "robust.png", png.getvalue())
    return [output / "robust.json", output / "robust.png"]
