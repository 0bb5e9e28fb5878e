"""The pictures of the demo: photographs, atoms and plots, as PNG files and as data: addresses for the page."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.run import write_whole

INK, GREY, BLUE, ORANGE = "#1c2733", "#9aa6b2", "#2563a8", "#d9822b"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaef",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}
matplotlib.rcParams.update(STYLE)

# Kinds of pictures of one photograph, in the order shown, and their names.
KINDS = {"noisy": "noisy", "ista": "best ISTA", "network": "LISTAConv", "clean": "clean"}
# The part shown of a photograph: its size, and the corner where that is not the one of the middle.
DETAIL = 200
CORNERS = {"camera.png": (40, 150)}


class Album:
    """Writes pictures to a folder and gives them as HTML tags that need no file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def tag(self, name: str, png: bytes, description: str) -> str:
        write_whole(self.folder / f"{name}.png", png)
        data = base64.b64encode(png).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{escape(description)}">'

    def figure(self, name: str, figure: Figure, description: str) -> str:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return self.tag(name, buffer.getvalue(), description)

    def grey(self, name: str, picture: np.ndarray, description: str) -> str:
        buffer = io.BytesIO()
        matplotlib.image.imsave(buffer, picture, cmap="gray", vmin=0, vmax=1, format="png")
        return self.tag(name, buffer.getvalue(), description)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure that needs no window, and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns)


def detail(picture: Tensor, file: str) -> np.ndarray:
    """The part of a photograph (1, H, W) that is shown; all of a smaller one."""
    middle = tuple(max((length - DETAIL) // 2, 0) for length in picture.shape[1:])
    top, left = CORNERS.get(file, middle) if min(picture.shape[1:]) > 2 * DETAIL else middle
    return picture[0, top : top + DETAIL, left : left + DETAIL].clamp(0, 1).numpy()


def caption(scores: dict[str, list[float]], kind: str, index: int) -> str:
    return KINDS[kind] + (f", {scores[kind][index]:.2f} dB" if kind in scores else "")


def overview(files: list[str], scores: dict[str, list[float]], photographs: dict[str, list[Tensor]]) -> Figure:
    """The first two photographs, a row each: the picture of the README."""
    figure, axes = new_figure(8, 4.4, 2, len(KINDS))
    for index in range(2):
        for axis, kind in zip(axes[index], KINDS, strict=True):
            axis.imshow(detail(photographs[kind][index], files[index]), cmap="gray", vmin=0, vmax=1)
            axis.set_title(caption(scores, kind, index), fontsize=9)
            axis.set_axis_off()
    return figure


def mosaic(atoms: Tensor, pixel: int = 6) -> np.ndarray:
    """Atoms (M, 1, k, k) on a square sheet, each scaled to its largest value, zero being middle grey."""
    across, kernel = math.ceil(len(atoms) ** 0.5), atoms.shape[-1]
    down = math.ceil(len(atoms) / across)
    scaled = 0.5 + 0.5 * atoms / atoms.abs().amax(dim=(1, 2, 3), keepdim=True)
    sheet = np.full((down * (kernel + 1) + 1, across * (kernel + 1) + 1), 0.88)
    for number, atom in enumerate(scaled[:, 0].numpy()):
        top, left = (1 + place * (kernel + 1) for place in divmod(number, across))
        sheet[top : top + kernel, left : left + kernel] = atom
    return sheet.repeat(pixel, 0).repeat(pixel, 1)


def losses(curves: dict[str, list[list[float]]], label: str) -> Figure:
    """Loss against epoch; the runs of one name share its colour."""
    figure, axis = new_figure(5, 2.8)
    for (name, runs), colour in zip(curves.items(), (BLUE, ORANGE), strict=False):
        for number, values in enumerate(runs):
            axis.plot(range(1, len(values) + 1), values, color=colour, lw=1.6, label=None if number else name)
    axis.set(xlabel="epoch", ylabel=label, yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1:
        axis.legend()
    return figure


def densities(layers: list[str], means: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Figure:
    """A bar for each layer and gamma, the single runs as dots."""
    figure, axis = new_figure(5, 2.8)
    for number, (entry, colour) in enumerate(zip(means, (BLUE, ORANGE), strict=False)):
        place = np.arange(len(layers)) + (number - (len(means) - 1) / 2) * 0.36
        heights = [entry["density"][layer] for layer in layers]
        bars = axis.bar(place, heights, 0.32, color=colour, alpha=0.75, label=f"gamma = {entry['gamma']:g}")
        axis.bar_label(bars, [f"{height:.3f}" for height in heights], label_type="center", color="white")
        for run in runs:
            if run["gamma"] == entry["gamma"]:
                axis.plot(place, [run["density"][layer] for layer in layers], ".", color=INK, ms=4)
    axis.set_xticks(range(len(layers)), layers)
    axis.set(ylabel="density")
    axis.grid(visible=False, axis="x")
    axis.legend()
    return figure


def ratios(results: list[dict[str, Any]]) -> Figure:
    """How many times as long plain PyTorch takes, a bar for each case."""
    figure, axis = new_figure(5, 2)
    values = [result["ratio"] for result in results]
    bars = axis.barh([result["case"] for result in results], values, 0.5, color=BLUE)
    axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    axis.axvline(1, color=GREY, lw=1)
    axis.invert_yaxis()
    axis.set(xlabel="time of plain PyTorch / time of the fused operator")
    axis.grid(visible=False, axis="y")
    return figure
