"""The results of `python -m examples.theory` for people: figures, tables, and which promises hold."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.run import write_whole
from examples.demo_report import Table
from examples.pictures import BLUE, GREY, INK, ORANGE, new_figure

Results = dict[str, Any]
GREEN, RED, VIOLET = "#2e8b57", "#c0392b", "#7b4fa3"
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)
STYLES = {"layerwise": BLUE, "deepest-first": ORANGE}

# NMSE in dB after 16 layers without noise and at 40, 30, 20 dB, of a short training run of the published definitions by
# others: reference numbers, not ours and not the papers' curves, which reach further.
REFERENCE = {
    "ISTA": {"noiseless": -6.19, "40 dB": -6.18, "30 dB": -6.18, "20 dB": -6.08},
    "FISTA": {"noiseless": -10.87, "40 dB": -10.87, "30 dB": -10.84, "20 dB": -10.51},
    "LISTA-CP": {"noiseless": -22.36},
    "LISTA-CP-SS": {"noiseless": -49.89},
    "ALISTA": {"noiseless": -62.79, "40 dB": -42.16, "30 dB": -31.51, "20 dB": -19.78},
}
NAMES = {"LISTA-CP-SS": "LISTA-CP, support selection", "ALISTA": "ALISTA, support selection"}


def depth_figure(results: Results) -> Figure:
    """A row for each noise level, a column for each number of layers; the error of the deepest code."""
    cases = results["cases"]
    deltas = sorted({case["delta"] for case in cases})
    layers = sorted({case["layers"] for case in cases})
    figure, axes = new_figure(8, 2.3 * len(deltas), len(deltas), len(layers))
    for case in cases:
        axis = axes[deltas.index(case["delta"])][layers.index(case["layers"])]
        colour = STYLES[case["method"]]
        # A float64 error of exactly 0 has no logarithm.
        errors = [max(errors[-1], 1e-17) for errors in case["errors"]]
        axis.plot(case["depths"], errors, color=colour, label=f"{case['method']}, measured")
        bounds = [bounds[-1] for bounds in case["bounds"]]
        axis.plot(case["depths"], bounds, "--", color=colour, label=f"{case['method']}, bound")
        axis.set(yscale="log")
        noise = "no noise" if case["delta"] == 0 else f"noise {case['delta']:g} in l1 norm"
        axis.set_title(f"{case['layers']} layer{'s' * (case['layers'] > 1)}, {noise}", fontsize=9)
    for row in axes:
        row[0].set(ylabel=r"$\|x_J - x_J^*\|_2$, worst")
    for axis in axes[-1]:
        axis.set(xlabel="iterations K")
    axes[0][0].legend(fontsize=6)
    return figure


def depth_table(results: Results) -> Table:
    head = ["layers, method, noise", "non-zeros", "coherences mu~", "error at the last K", "bound"]
    rows = []
    for case in results["cases"]:
        rows.append(
            [
                f"{case['layers']}, {case['method']}, {case['delta']:g}",
                ", ".join(map(str, case["sparsity"])),
                ", ".join(f"{mu:.3f}" for mu in case["mu"]),
                f"{case['errors'][-1][-1]:.1e}",
                f"{case['bounds'][-1][-1]:.1e}",
            ]
        )
    return Table(head, rows)


def depth_promises(results: Results) -> dict[str, bool]:
    holds = all(
        error <= bound
        for case in results["cases"]
        for errors, bounds in zip(case["errors"], case["bounds"], strict=True)
        for error, bound in zip(errors, bounds, strict=True)
    )
    return {"Every error is under its bound, at every depth, in every layer, by both methods": holds}


def stability_figure(results: Results) -> Figure:
    figure, axis = new_figure(5, 2.8)
    layers = range(1, len(results["measured"]) + 1)
    axis.plot(layers, results["earlier"]["layered"], "o--", color=RED, label="earlier: twice in every layer")
    projected = [value if math.isfinite(value) else math.nan for value in results["earlier"]["projected"]]
    axis.plot(layers, projected, "s--", color=VIOLET, label="earlier: projection")
    axis.plot(layers, results["bound"], "o-", color=BLUE, label="Theorem 2.3")
    axis.plot(layers, results["measured"], "o-", color=ORANGE, label="found by trying")
    axis.set(xlabel="layer j", ylabel=r"$\|x_j - \tilde x_j\|_2$", yscale="log", xticks=list(layers))
    axis.legend()
    return figure


def stability_table(results: Results) -> Table:
    columns = (results["measured"], results["bound"], results["earlier"]["layered"], results["earlier"]["projected"])
    rows = [
        [f"layer {j}", str(results["lambdas"][j - 1]), f"{results['mu'][j - 1]:.3f}", *[f"{v:.3f}" for v in values]]
        for j, values in enumerate(zip(*columns, strict=True), start=1)
    ]
    return Table(["", "non-zeros", "mu", "found", "Theorem 2.3", "earlier, layered", "earlier, projection"], rows)


def stability_promises(results: Results) -> dict[str, bool]:
    pairs = zip(results["measured"], results["bound"], results["earlier"]["layered"], strict=True)
    return {
        "The error found is under the bound, the bound under the earlier one": all(a <= b <= c for a, b, c in pairs)
    }


def activation_figure(results: Results) -> Figure:
    figure, (left, right) = new_figure(8, 3, 1, 2)
    betas = results["betas"]
    for (name, errors), colour in zip(results["certified"].items(), COLOURS, strict=False):
        left.plot(betas, errors, "o-", ms=3, color=colour, label=name)
    left.plot(betas, results["bounds"], "--", color=INK, label="bound")
    left.set(xscale="log", yscale="log", xlabel="beta", ylabel="error", title="certified for beta")
    for beta, errors, colour in zip(betas, results["against_slope"], COLOURS, strict=False):
        right.plot(results["slopes"], errors, "o-", ms=3, color=colour, label=f"beta = {beta:g}")
    right.axhline(results["relu"][0], color=INK, lw=1, ls=":", label="relu")
    right.set(xscale="log", yscale="log", xlabel="L, slope below 0", ylabel="error", title="certified for relu")
    for axis in (left, right):
        axis.legend(fontsize=7)
    return figure


def activation_table(results: Results) -> Table:
    head = ["beta", *results["certified"], "bound"]
    rows = [
        [f"{beta:g}", *[f"{errors[n]:.1e}" for errors in results["certified"].values()], f"{results['bounds'][n]:.1e}"]
        for n, beta in enumerate(results["betas"])
    ]
    return Table(head, rows)


def activation_promises(results: Results) -> dict[str, bool]:
    bounds = results["bounds"]
    under = all(e <= b for errors in results["certified"].values() for e, b in zip(errors, bounds, strict=True))
    return {"The error of every activation is under the bound of its beta": under}


def cnn_figure(results: Results) -> Figure:
    figure, axes = new_figure(8, 3, 1, 2)
    kernels = sorted({row["kernel"] for row in results["networks"]})
    for kernel, colour in zip(kernels, COLOURS, strict=False):
        rows = [row for row in results["networks"] if row["kernel"] == kernel]
        places = [row["d"] + row["m"] for row in rows]
        for axis, counted in zip(axes, ("depth", "weights"), strict=True):
            axis.plot(places, [row[counted] for row in rows], "o-", ms=3, color=colour, label=f"s = {kernel}")
            axis.plot(places, [row[f"{counted}_order"] for row in rows], "--", lw=1, color=colour)
        axes[1].plot(places, [row["nonzeros"] for row in rows], ":", color=colour)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(places, [str(place) for place in places], minor=False)
        axis.minorticks_off()
    axes[0].set(xlabel="d + m", ylabel="depth", title=r"dashed: $K \log_s(d+m)$")
    axes[1].set(yscale="log", xlabel="d + m", ylabel="weights")
    axes[1].set(title=r"dashed: $K (d+m)^2$, dotted: not zero")
    axes[0].legend()
    return figure


def cnn_table(results: Results) -> Table:
    head = ["m, d, s", "depth", "depth / K log_s(d+m)", "weights", "weights / K (d+m)^2", "not zero"]
    rows = [
        [
            f"{row['m']}, {row['d']}, {row['kernel']}",
            str(row["depth"]),
            f"{row['depth'] / row['depth_order']:.2f}",
            f"{row['weights']:,}",
            f"{row['weights'] / row['weights_order']:.2f}",
            f"{row['nonzeros']:,}",
        ]
        for row in results["networks"]
    ]
    return Table(head, rows)


def cnn_promises(results: Results) -> dict[str, bool]:
    """The constants: 2 matrices an iteration on 2 (d + m) rows at most, each s n filled up to a power of s."""
    rows = results["networks"]
    deep = all(row["depth"] <= 2 * row["depth_order"] + 4 * results["settings"]["iterations"] for row in rows)
    heavy = all(row["weights"] <= 8 * (2 + row["kernel"]) * row["weights_order"] for row in rows)
    return {"The depth is of order K log_s(d + m)": deep, "The weights are of order K (d + m)^2": heavy}


def failures_figure(results: Results) -> Figure:
    figure, axis = new_figure(5.5, 3)
    lines = ("-", "--", ":")
    for (name, layers), colour in zip(results["failures"].items(), (ORANGE, BLUE), strict=True):
        for j, (shares, line) in enumerate(zip(layers, lines, strict=False), start=1):
            axis.plot(results["iterations"], [100 * s for s in shares], line, color=colour, label=f"{name}, layer {j}")
    axis.set(xscale="log", xlabel="iterations", ylabel="coordinates that fail, %")
    axis.legend(fontsize=7)
    return figure


def failures_table(results: Results) -> Table:
    shown = results["iterations"]
    rows = [
        [f"{name}, layer {j}", *[f"{share:.2%}" for share in shares]]
        for name, layers in results["failures"].items()
        for j, shares in enumerate(layers, start=1)
    ]
    return Table(["failures after", *map(str, shown)], rows)


def failures_promises(results: Results) -> dict[str, bool]:
    if results["iterations"][-1] < 100:  # --fast stops before
        return {}
    return {"MSD-CSC fails nowhere in the end": all(shares[-1] == 0 for shares in results["failures"]["MSD-CSC"])}


def benchmark_figure(results: Results) -> Figure:
    levels = results["levels"]
    figure, axes = new_figure(8, 2.8 * math.ceil(len(levels) / 2), math.ceil(len(levels) / 2), min(len(levels), 2))
    axes = [axes] if len(levels) == 1 else list(axes.flat)
    kinds = list(dict.fromkeys(row["kind"] for row in results["networks"]))
    for axis, level in zip(axes, levels, strict=False):
        for row in results["networks"]:
            if row["level"] == level:
                colour, layers = COLOURS[kinds.index(row["kind"])], range(1, len(row["nmse"]) + 1)
                axis.plot(layers, row["nmse"], color=colour, label=NAMES.get(row["kind"], row["kind"]))
                if level in REFERENCE.get(row["kind"], {}) and len(row["nmse"]) == 16:
                    axis.plot(16, REFERENCE[row["kind"]][level], "x", color=colour)
        axis.set(xlabel="layer", ylabel="NMSE, dB")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(level + (" (x: reference numbers)" if level == levels[0] else ""), fontsize=9)
    axes[0].legend(fontsize=6)
    return figure


def benchmark_table(results: Results) -> Table:
    head = ["NMSE in dB, last layer", *results["levels"], "training steps", "seconds"]
    rows = []
    for kind in dict.fromkeys(row["kind"] for row in results["networks"]):
        found = [row for row in results["networks"] if row["kind"] == kind]
        steps, seconds = (f"{sum(row[name] for row in found):,.0f}" for name in ("steps", "seconds"))
        rows.append([NAMES.get(kind, kind), *[f"{row['nmse'][-1]:.2f}" for row in found], steps, seconds])
        if kind in REFERENCE and len(found[0]["nmse"]) == 16:
            numbers = [f"{REFERENCE[kind][n]:.2f}" if n in REFERENCE[kind] else "" for n in results["levels"]]
            rows.append(["  reference, a short run by others", *numbers, "", ""])
    return Table(head, rows)


def benchmark_promises(results: Results) -> dict[str, bool]:
    return {}


def of(step: str, kind: str) -> Any:
    return globals()[f"{step}_{kind}"]


def text(step: str, results: Results) -> str:
    """The results of a step for the console."""
    return of(step, "table")(results).text()


def promises(step: str, results: Results) -> dict[str, bool]:
    """What the theory says of a step's results, and whether it is so."""
    return of(step, "promises")(results)


def write(step: str, results: Results, folder: Path) -> Path:
    """The figure of a step, as a small PNG."""
    buffer, path = io.BytesIO(), folder / f"theory-{step}.png"
    of(step, "figure")(results).savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
    return path
