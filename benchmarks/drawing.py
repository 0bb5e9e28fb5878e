"""The drawing of docs/performance.md, one step of `lista` on packed codes: `python -m benchmarks.drawing`."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from benchmarks.machine import write_whole
from benchmarks.program import FIGURES
from examples.pictures import BLUE, GREY, INK, ORANGE

PALE, SLATE, WHITE = "#e6eaef", "#5d6b78", "#ffffff"
PIXELS, ATOMS = 4, 12  # of the drawn part of a code


def cell(axis: Axes, x: float, y: float, width: float, height: float, colour: str = WHITE, **options: object) -> None:
    """A box with its lower left corner at (x, y)."""
    axis.add_patch(Rectangle((x, y), width, height, **{"facecolor": colour, "edgecolor": GREY, "lw": 0.6} | options))


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.3, "color": colour, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, **style))


def words(axis: Axes, x: float, y: float, text: str, **options: object) -> None:
    axis.text(x, y, text, **{"ha": "center", "va": "top", "fontsize": 8.5, "linespacing": 1.25} | options)


def code(axis: Axes, x: float, name: str, density: float, seed: int, note: str) -> None:
    """Masks of some pixels, a row each, and the values of their non-zeros beneath."""
    masks = np.random.default_rng(seed).random((PIXELS, ATOMS)) < density
    words(axis, x + 8, 66, name, fontsize=10, fontweight="bold")
    words(axis, x + 8, 61.6, "masks: a bit an atom", color=INK)
    for row, mask in enumerate(masks):
        for atom, bit in enumerate(mask):
            cell(axis, x + atom * 4 / 3, 55.6 - 2.2 * row, 4 / 3, 1.9, BLUE if bit else WHITE)
    words(axis, x + 8, 48, "values: non-zeros", color=INK)
    for place in range(int(masks.sum())):
        cell(axis, x + place * 4 / 3, 42.4, 4 / 3, 2.2, ORANGE)
    words(axis, x + 8, 41, note)


def plane(axis: Axes, x: float, name: str, patches: list[tuple[int, int]], colour: str, note: str) -> None:
    """A plane of a unit with its border, and some patches of 3 x 3 in it."""
    size = 16 / 9
    words(axis, x + 8, 66, name, fontsize=10, fontweight="bold")
    for row in range(9):
        for column in range(9):
            border = row in (0, 8) or column in (0, 8)
            cell(axis, x + column * size, 59 - row * size, size, size, PALE if border else WHITE, edgecolor="#cfd6dd")
    for row, column in patches:
        corner = (x + column * size, 59 - (row + 2) * size, 3 * size, 3 * size)
        cell(axis, *corner, colour, alpha=0.22, lw=0)
        cell(axis, *corner, "none", edgecolor=colour, lw=1.2)
    words(axis, x + 8, 43.4, note)


def tile(axis: Axes, x: float) -> None:
    """Six pixels by two vectors of atoms in registers, a tap of the pixels and of the weights."""
    words(axis, x + 9, 66, "A_W: a register tile", fontsize=10, fontweight="bold")
    words(axis, x + 9, 61.8, "tap after tap")
    for vector in range(2):
        cell(axis, x + 4.5 + 7 * vector, 56.6, 6.4, 1.9, BLUE, alpha=0.55)
        for pixel in range(6):
            cell(axis, x + 4.5 + 7 * vector, 53.6 - 1.75 * pixel, 6.4, 1.5, "#dbe6f2", edgecolor=BLUE)
    for pixel in range(6):
        cell(axis, x + 1.6, 53.6 - 1.75 * pixel, 1.6, 1.5, ORANGE, alpha=0.6)
    words(axis, x + 9, 43.4, "6 pixels x 2 vectors of sums\n(4 with AVX-512); the dense\nwork, for every atom")


def tape(axis: Axes) -> None:
    """The parts of the tape; what no code has written is hatched."""
    words(axis, 0, 22.5, "the tape of K steps", ha="left", fontsize=10, fontweight="bold")
    # Width, name, colour, and of three steps: the name, the distance from one to the next, and how much is written.
    parts = [
        (8, "places", BLUE, "", 2.0, 0.6),
        (50, "values, the arena of all steps", ORANGE, "x$_{}$", 9.0, 9.0),
        (17, "residuals", GREY, "r$_{}$", 17 / 3, 17 / 3),
        (22, "masks", BLUE, "x$_{}$", 22 / 3, 22 / 3),
        (3, "end", BLUE, "", 0.0, 0.0),
    ]
    left = 0.0
    for width, name, colour, label, distance, written in parts:
        cell(axis, left, 9, width, 7, "none", hatch="////", edgecolor=PALE)
        for k in range(3 if written else 0):
            cell(axis, left + k * distance, 9, written, 7, colour, alpha=0.35, edgecolor=colour)
            words(axis, left + (k + 0.5) * distance, 12.5, label.format(k + (label[:1] == "x")), va="center")
        cell(axis, left, 9, width, 7, "none", edgecolor=INK, lw=0.9)
        words(axis, left + width / 2, 7.6, name)
        left += width
    words(axis, 46.5, 12.5, "never touched", va="center", color=SLATE, bbox={"fc": WHITE, "ec": "none", "pad": 1.5})
    words(
        axis,
        0,
        2.8,
        "One piece of memory, sized for the worst case by shapes alone, touched only as far as codes have non-zeros.",
        ha="left",
    )


def step() -> Figure:
    """One step, from a packed code to the next, and the tape beneath."""
    figure = Figure(figsize=(9, 5.6))
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set(xlim=(-0.5, 100.5), ylim=(-1, 75))

    for left, right, text in (
        (0, 40.5, "phase 1: every unit by itself"),
        (43.5, 100, "phase 2, when all units are done"),
    ):
        axis.plot([left, right], [69.3, 69.3], color=GREY, lw=1)
        words(axis, left, 73.2, text, ha="left", color=SLATE)
    axis.plot([42, 42], [28, 73], color=GREY, lw=1, ls=(0, (3, 3)))

    code(axis, 0, "packed code x$_k$", 0.2, 13, "pixel after pixel,\nin rising order of atoms")
    arrow(axis, (17, 52), (23.3, 52))
    words(axis, 20.2, 57, "S_D", fontweight="bold", color=BLUE)
    plane(
        axis,
        24,
        "plane of a unit",
        [(1, 1), (2, 3), (4, 5)],
        ORANGE,
        "value x atom of each\nnon-zero is added\nto a pixel's patch",
    )
    plane(
        axis,
        45,
        "residual",
        [(3, 1), (3, 2), (3, 3), (3, 4)],
        BLUE,
        "y less the planes that\nmeet here; neighbours'\npatches overlap",
    )
    arrow(axis, (40.4, 52), (44.4, 52))
    arrow(axis, (61.4, 52), (64.6, 52))
    tile(axis, 63.5)
    arrow(axis, (81.9, 52), (83.8, 52))
    code(axis, 84.4, "x$_{k+1}$", 0.18, 5, "+ x$_k$, threshold, pack:\nwhat is not zero\nmoves together")

    axis.plot([87, 87, 31], [33, 26.5, 26.5], color=ORANGE, lw=1.3)
    arrow(axis, (31, 26.5), (31, 16.6), ORANGE)
    arrow(axis, (95.5, 33), (95.5, 16.6), BLUE)
    axis.plot([60, 60, 72.2], [33, 30, 30], color=SLATE, lw=1.3)
    arrow(axis, (72.2, 30), (72.2, 16.6), SLATE)
    words(axis, 32, 25, "values", ha="left")
    words(axis, 94.6, 24, "masks", ha="right")
    words(axis, 71.2, 24, "where worth keeping", ha="right")
    tape(axis)
    return figure


if __name__ == "__main__":
    buffer = io.BytesIO()
    step().savefig(buffer, format="png")
    write_whole(FIGURES / "kernels.png", buffer.getvalue())
    print(f"Written: {FIGURES / 'kernels.png'}")
