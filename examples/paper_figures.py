"""The figures of the papers from our runs: see :mod:`examples.report`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.machine import write_whole
from examples.csc_tables import FAMILIES
from examples.pictures import BLUE, INK, ORANGE, new_figure
from examples.report import ACTIVATIONS, CLASSIFIERS, DEEP_ROWS, NETWORKS, SEGMENTERS, Results, Run, densities, title

GREEN, RED = "#2e8b57", "#c0392b"
COLOURS = dict(zip((*ACTIVATIONS, "lista", ""), (BLUE, ORANGE, GREEN, RED, BLUE), strict=True))


def curve(axis: Axes, runs: list[Run], name: str, **style: Any) -> None:
    """What was logged against the epoch: the mean over seeds, and their range as a band."""
    seeds = [run["history"].get(name, []) for run in runs]
    length = min(map(len, seeds), default=0)
    if not length:
        return
    values = np.array([[np.nan if value is None else value for value in seed[:length]] for seed in seeds])
    epoch = np.arange(1, length + 1)
    axis.plot(epoch, values.mean(0), lw=1.5, **style)
    if len(seeds) > 1:
        axis.fill_between(epoch, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)


def curves(axis: Axes, results: Results, rows: list[str], name: str) -> None:
    """A colour for each row, dashed without the penalty and solid with it."""
    for row in rows:
        colour = COLOURS[row.partition("-")[2]]
        curve(axis, results.get(row, []), name, color=colour, ls="--", label=title(row))
        curve(axis, results.get(f"{row}-l1", []), name, color=colour, label=f"{title(row)} + l1")
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if axis.lines:
        axis.legend(fontsize=7)


def classifiers(results: Results, network: str) -> list[str]:
    return [row for row in CLASSIFIERS if row.startswith(network) and {row, f"{row}-l1"} & results.keys()]


def sets(results: Results, key: str) -> str:
    """What the Unet's runs call their training set, "data", or their test sets, "tests": composites are not DUTS."""
    runs = [run for row in DEEP_ROWS if row.startswith("unet") for run in results.get(row, [])]
    names = [name for run in runs for name in ([run[key]] if isinstance(run[key], str) else run[key])]
    return "; ".join(dict.fromkeys(names))


def accuracy(results: Results) -> Figure | None:
    networks = [network for network in ("lenet5", "vgg11") if classifiers(results, network)]
    if not networks:
        return None
    figure, axes = new_figure(4.2 * len(networks), 3, 1, len(networks))
    for axis, network in zip(np.atleast_1d(axes), networks, strict=True):
        curves(axis, results, classifiers(results, network), "val_accuracy")
        axis.set(title=NETWORKS[network], ylabel="accuracy on the test pictures")
    return figure


def training_loss(network: str) -> Callable[[Results], Figure | None]:
    def draw_loss(results: Results) -> Figure | None:
        if not classifiers(results, network):
            return None
        figure, axis = new_figure(5, 3)
        curves(axis, results, classifiers(results, network), "train_loss")
        axis.set(title=NETWORKS[network], ylabel="cross entropy in training")
        return figure

    return draw_loss


def bce_and_penalty(results: Results) -> Figure | None:
    rows = [row for row in SEGMENTERS if {row, f"{row}-l1"} & results.keys()]
    if not rows:
        return None
    figure, axes = new_figure(8, 3.3, 1, 2)
    for axis, name, label in zip(axes, ("train_loss", "train_l1"), ("BCE", "sum of mean |x| over blocks"), strict=True):
        curves(axis, results, rows, name)
        axis.set(title=sets(results, "data"), ylabel=f"{label} in training")
    return figure


def density(results: Results) -> Figure | None:
    """Bars for each feature, plain and penalised, a panel for each network; of elu and mish all is near 1."""
    rows = [row for row in ("lenet5-relu", "vgg11-relu", "unet") if {row, f"{row}-l1"} & results.keys()]
    if not rows:
        return None
    figure, axes = new_figure(4 * len(rows), 2.8, 1, len(rows))
    for axis, row in zip(np.atleast_1d(axes), rows, strict=True):
        for place, (name, label, colour) in enumerate(((row, "plain", BLUE), (f"{row}-l1", "l1", ORANGE))):
            found = densities(results.get(name, []))
            if found:
                axis.bar(np.arange(len(found)) + 0.38 * place - 0.19, found.values(), 0.36, color=colour, label=label)
                axis.set_xticks(range(len(found)), list(found), rotation=40, fontsize=7)
        where = f"\n{sets(results, 'tests')}" if row == "unet" else ""
        axis.set(title=title(row) + where, ylabel="density at 1e-6", ylim=(0, 1))
        axis.grid(visible=False, axis="x")
        axis.legend()
    return figure


def masks(runs: Path) -> Figure | None:
    """The first test pictures, their masks, and what the Unet without and with the penalty says."""
    paths = {row: sorted((runs / row).glob("seed*/masks.pt"))[:1] for row in ("unet", "unet-l1")}
    saved = {row: torch.load(path[0], weights_only=True) for row, path in paths.items() if path}
    if not saved:
        return None
    first = next(iter(saved.values()))
    columns = {"picture": (first["images"] + 1) / 2, "mask": first["masks"]}
    columns |= {
        f"{title(row.removesuffix('-l1'))}{' + l1' * row.endswith('-l1')}": v["probabilities"]
        for row, v in saved.items()
    }
    count = len(first["images"])
    figure, axes = new_figure(1.7 * len(columns), 1.7 * count, count, len(columns))
    for line, row_of_axes in enumerate(np.atleast_2d(axes)):
        for axis, (name, values) in zip(row_of_axes, columns.items(), strict=True):
            axis.imshow(values[line].permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if line == 0:
                axis.set_title(name, fontsize=8, color=INK)
    return figure


def csc_accuracy(results: Results) -> Figure | None:
    """A panel for each paper of the convolutional sparse coding family."""
    families = [family for family in FAMILIES if {entry.row for entry in family.entries} & results.keys()]
    if not families:
        return None
    figure, axes = new_figure(4.2 * len(families), 3, 1, len(families))
    for axis, family in zip(np.atleast_1d(axes), families, strict=True):
        for number, entry in enumerate(entry for entry in family.entries if entry.row in results):
            curve(axis, results[entry.row], "val_accuracy", color=f"C{number}", label=entry.title)
        axis.set(title=family.source.partition(":")[0], ylabel="accuracy on the test pictures", xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=7)
    return figure


FIGURES: dict[str, tuple[Callable[[Results], Figure | None], str]] = {
    "accuracy": (accuracy, "Figure 1: accuracy on the test pictures of CIFAR-10. Bands are the range over seeds."),
    "loss-lenet5": (training_loss("lenet5"), "Figure 2: training loss of LeNet-5, without the penalty's share."),
    "loss-vgg11": (training_loss("vgg11"), "Figure 3: training loss of VGG11, without the penalty's share."),
    "bce-penalty": (
        bce_and_penalty,
        "Figure 5: BCE and the l1 norm that gamma weighs, of the Unet in training ({data}).",
    ),
    "density": (density, "Figure 6: density of each block after training, at alpha 1e-6, averaged over test pictures."),
    "csc-accuracy": (csc_accuracy, "Accuracy of the convolutional sparse coding networks, a panel for each paper."),
}
MASKS = "Figure 4: first test pictures ({tests}), their masks, and the probabilities that the networks give."


def draw(results: Results, runs: Path, output: Path) -> dict[str, str]:
    """Draw all figures for which there are runs; their captions by name, also of those drawn from logs gone since."""
    drawn = {name: (function(results), text) for name, (function, text) in FIGURES.items()}
    drawn["masks"] = masks(runs), MASKS
    for name, (figure, _) in drawn.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            write_whole(output / f"{name}.png", buffer.getvalue())
    places = {key: sets(results, key) for key in ("data", "tests")}
    return {name: text.format(**places) for name, (_, text) in drawn.items() if (output / f"{name}.png").exists()}
