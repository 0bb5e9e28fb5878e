"""The figures of a run: speed-up of each case, time against density, memory against K."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.machine import write_whole
from benchmarks.run import Row
from benchmarks.timing import FUSED
from examples.pictures import BLUE, GREY, INK, ORANGE, new_figure


def unrolled(rows: list[Row], **wanted: object) -> list[Row]:
    """The rows of K unrolled iterations on photographs that have the values asked for."""
    wanted = {"section": "cases", "setting": "photographs"} | wanted
    chosen = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return [row for row in chosen if row["iterations"] > 1]


def several(rows: list[Row]) -> list[str]:
    """The cases with more than one row: those that make a line."""
    counts = Counter(row["case"] for row in rows)
    return [name for name, count in counts.items() if count > 1]


def speedups(rows: list[Row]) -> Figure | None:
    """A bar for each case and mode: the fastest baseline's time over the fused one, at the density nearest 0.1."""
    rows = unrolled(rows)
    if not rows:
        return None
    density = min({row["density_asked"] for row in rows}, key=lambda p: abs(p - 0.1))
    rows = unrolled(rows, density_asked=density)
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axis = new_figure(7, 0.6 + 0.5 * len(names))
    for offset, (mode, colour) in zip((-0.2, 0.2), (("training", BLUE), ("forward", GREY)), strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        label = "forward and backward" if mode == "training" else "forward"
        places = [names.index(row["case"]) + offset for row in chosen]
        bars = axis.barh(places, [row["ratio"] for row in chosen], 0.36, color=colour, label=label)
        axis.bar_label(bars, [f"{row['ratio']:.1f}  ({row['fastest']})" for row in chosen], padding=3, fontsize=7)
    axis.axvline(1, color=INK, lw=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set(xlabel=f"time of the fastest baseline (its name) / time of the fused operator, density {density:g}")
    axis.grid(visible=False, axis="y")
    axis.legend(loc="lower right")
    return figure


def densities(rows: list[Row]) -> Figure | None:
    """Training time against the mean density of the codes, a plot for each case, with the line of proportionality."""
    rows = unrolled(rows, mode="training")
    names = several(rows)
    if not names:
        return None
    columns = min(len(names), 4)
    height = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.3 * height + 0.4))
    for number, name in enumerate(names):
        axis = figure.add_subplot(height, columns, number + 1)
        chosen = sorted((row for row in rows if row["case"] == name), key=lambda row: row["mean_density"])
        means = [row["mean_density"] for row in chosen]
        fused = [row["contenders"][FUSED]["median"] * 1e3 for row in chosen]
        baseline = [row["contenders"][row["fastest"]]["median"] * 1e3 for row in chosen]
        axis.plot(means, baseline, "o-", color=ORANGE, ms=3, label="fastest baseline")
        axis.plot(means, fused, "o-", color=BLUE, ms=3, label="fused")
        proportional = [fused[-1] * mean / means[-1] for mean in means]
        axis.plot(means, proportional, ":", color=INK, lw=1, label="in proportion to the non-zeros")
        axis.set_title(name, fontsize=9)
        axis.set(xscale="log", yscale="log")
        axis.minorticks_off()
        axis.set_xticks(means, [f"{mean:.2g}" for mean in means])
        if number % columns == 0:
            axis.set_ylabel("ms a training step")
        if number // columns == height - 1:
            axis.set_xlabel("mean density")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def memory(rows: list[Row]) -> Figure | None:
    """Peak memory of a training step against K, for the cases that were measured at several K."""
    rows = [row for row in rows if row["section"] == "memory"]
    names = several(rows)
    if not names:
        return None
    figure, axes = new_figure(3.2 * len(names) + 0.6, 2.8, 1, len(names))
    for axis, name in zip([axes] if len(names) == 1 else axes, names, strict=True):
        chosen = sorted((row for row in rows if row["case"] == name), key=lambda row: row["iterations"])
        iterations = [row["iterations"] for row in chosen]
        for what, colour in ((FUSED, BLUE), ("eager", ORANGE)):
            if all(what in row["contenders"] for row in chosen):
                sizes = [row["contenders"][what]["median"] / 2**20 for row in chosen]
                axis.plot(iterations, sizes, "o-", color=colour, ms=3, label=what)
        axis.axhline(chosen[0]["code_bytes"] / 2**20, color=GREY, lw=1, label="one dense code")
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="K", xlim=(0, None), ylim=(0, None))
    figure.axes[0].set_ylabel("MiB at the peak of a training step")
    figure.axes[0].legend()
    return figure


FIGURES: dict[str, Callable[[list[Row]], Figure | None]] = {
    "speedup": speedups,
    "density": densities,
    "memory": memory,
}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write the figures for which there are rows; their files."""
    written = []
    for name, make in FIGURES.items():
        if figure := make(rows):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            written.append(folder / f"{name}.png")
            write_whole(written[-1], buffer.getvalue())
    return written
