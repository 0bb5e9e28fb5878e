"""`python -m examples.report`: the papers' tables and figures from the logs of `examples.train`."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from examples import csc_tables, require_extras

Run = dict[str, Any]  # a run.json, less its settings, with seed, folder and history: {column: a value for each epoch}
Results = dict[str, list[Run]]  # by row

ACTIVATIONS = ("relu", "elu", "mish")
NETWORKS = {"lenet5": "LeNet-5", "vgg11": "VGG11", "unet": "Unet"}
CLASSIFIERS = [f"{name}-{kind}" for name in ("lenet5", "vgg11") for kind in (*ACTIVATIONS, "lista")]
SEGMENTERS = ["unet", "unet-lista"]
DEEP_ROWS = [f"{row}{l1}" for row in CLASSIFIERS + SEGMENTERS for l1 in ("", "-l1")]
ROWS = [*DEEP_ROWS, *csc_tables.ROWS]
SCORES = ("PA", "mPA", "mIoU")

# Li, Feng, Zhou, arXiv 2408.05540: the weights of the penalty, and Table 4 as mean and standard deviation over images.
PAPER_GAMMA = {
    "lenet5-relu": 1e-3,
    "lenet5-elu": 1e-2,
    "lenet5-mish": 1e-4,
    "vgg11-relu": 1e-3,
    "vgg11-elu": 1e-5,
    "vgg11-mish": 1e-3,
    "unet": 1e-3,
}
PAPER_TABLE_4 = {
    ("unet", "DUTS-TE"): ((0.9203, 0.1004), (0.8423, 0.1529), (0.7584, 0.1840)),
    ("unet-l1", "DUTS-TE"): ((0.9224, 0.0972), (0.8446, 0.1494), (0.7582, 0.1799)),
    ("unet", "DUT-OMRON"): ((0.9166, 0.1097), (0.8305, 0.1749), (0.7503, 0.2060)),
    ("unet-l1", "DUT-OMRON"): ((0.9209, 0.1021), (0.8322, 0.1724), (0.7524, 0.2011)),
}

NOT_RUN = "not run"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.report",
        description="Collect what the runs under RUNS logged into one JSON a row in OUTPUT, and make the paper's "
        "figures and tables of all that is there, OUTPUT/README.md. Rows without a JSON are shown as not run.",
    )
    made.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/experiments"),
        help="folder with ROW/seedS of each run (%(default)s); may be missing: the report is then of the JSON alone",
    )
    made.add_argument(
        "--output", type=Path, default=Path("examples/results"), help="folder of the results (%(default)s)"
    )
    return made


# ------------------------------------------------------------------------------------------------------------ collect


def history(folder: Path) -> dict[str, list[float | None]]:
    """What a run logged, a list over the epochs for each name.

    Each time that a run was taken up has a file of its own; what a later file says about an epoch replaces the earlier.
    """
    epochs: dict[int, dict[str, float]] = defaultdict(dict)
    files = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    for file in files:
        with file.open(newline="") as lines:
            for line in csv.DictReader(lines):
                values = {name: float(value) for name, value in line.items() if value}
                epochs[int(values.pop("epoch"))] |= values
    names = sorted({name for values in epochs.values() for name in values} - {"step"})
    return {name: [epochs[epoch].get(name) for epoch in sorted(epochs)] for name in names}


def collect(runs: Path) -> Results:
    """The runs of the known rows that have come to the end of an epoch, by row and in the order of their seeds."""
    found: Results = {}
    for row in ROWS:
        for path in sorted((runs / row).glob("seed*/run.json")):
            facts = json.loads(path.read_text())
            if not facts["epochs"]:
                continue  # it has nothing to show yet
            settings = facts.pop("settings")
            kept = {"seed": settings["seed_everything"], "planned_epochs": settings["trainer"]["max_epochs"]}
            kept["network"] = settings["model"]["init_args"]["network"].get("init_args", {})
            kept["gamma"] = settings["model"]["init_args"].get("gamma")
            found.setdefault(row, []).append(facts | kept | {"history": rounded(history(path.parent))})
    return found


def rounded(columns: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """To five digits, which is more than any figure shows; densities of the last epoch alone."""
    short = {name: [None if v is None else float(f"{v:.5g}") for v in values] for name, values in columns.items()}
    return {name: values[-1:] if name.startswith("density/") else values for name, values in short.items()}


def gather(runs: Path, output: Path) -> Results:
    """Write the JSON of each row that has runs, and return those of all rows that have a JSON."""
    from benchmarks.machine import write_whole

    for row, found in collect(runs).items():
        write_whole(output / f"{row}.json", json.dumps(found, indent=1) + "\n")
    paths = {row: output / f"{row}.json" for row in ROWS}
    return {row: json.loads(path.read_text()) for row, path in paths.items() if path.exists()}


# -------------------------------------------------------------------------------------------------------------- tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def last(run: Run, name: str) -> float | None:
    values = run["history"].get(name)
    return values[-1] if values else None


def over_seeds(runs: list[Run], name: str, scale: float = 1.0, digits: int = 2) -> str:
    """Mean and, with several seeds, standard deviation of what was logged last."""
    values = [scale * value for run in runs if (value := last(run, name)) is not None]
    if not values:
        return NOT_RUN
    text = f"{fmean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def epochs(runs: list[Run]) -> str:
    """Epochs and seeds of a row, as short as it can be said."""
    if not runs:
        return ""
    done = sorted({run["epochs"] for run in runs})
    text = f"{'-'.join(map(str, done))} epochs, {len(runs)} {'seed' if len(runs) == 1 else 'seeds'}"
    return text + ("" if all(run["finished"] for run in runs) else ", unfinished")


def densities(runs: list[Run]) -> dict[str, float]:
    """The density of each feature after the last epoch, mean over seeds."""
    names = [name for name in (runs[0]["history"] if runs else ()) if name.startswith("density/")]
    return {name.removeprefix("density/"): fmean(last(run, name) for run in runs) for name in names}


def shown_densities(runs: list[Run]) -> str:
    return ", ".join(f"{value:.3f}" for value in densities(runs).values()) or NOT_RUN


def title(row: str) -> str:
    network, _, kind = row.partition("-")
    return " ".join([NETWORKS[network], *(["LISTAConv first"] if kind == "lista" else [kind] if kind else [])])


def classification_table(results: Results) -> str:
    rows = []
    for row in CLASSIFIERS:
        plain, penalised = results.get(row, []), results.get(f"{row}-l1", [])
        gamma = PAPER_GAMMA.get(row) or PAPER_GAMMA[f"{row.split('-')[0]}-relu"]
        accuracies = [over_seeds(runs, "val_accuracy", 100) for runs in (plain, penalised)]
        trained = (
            " / ".join(filter(None, (epochs(plain), epochs(penalised)))) if epochs(plain) != epochs(penalised) else ""
        )
        rows.append(
            [title(row), f"{gamma:g}", *accuracies, shown_densities(plain), shown_densities(penalised)]
            + [trained or epochs(plain)]
        )
    header = ["", "gamma", "accuracy %, plain", "accuracy %, l1", "density of blocks, plain", "density, l1", "trained"]
    return table(header, rows)


def segmentation_table(results: Results) -> str:
    rows = []
    for (row, test), scores in PAPER_TABLE_4.items():
        name = title(row.removesuffix("-l1")) + (" + l1" if row.endswith("-l1") else "")
        rows.append([name, "paper", test, *(f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in scores), ""])
    segmenters = [f"{row}{l1}" for row in SEGMENTERS for l1 in ("", "-l1")]
    made = [run for row in segmenters for run in results.get(row, [])]
    priors = {test: scores for run in made for test, scores in zip(run["tests"], run.get("prior", []), strict=False)}
    for test, scores in priors.items():
        shown = [f"{scores[score]:.4f} ± {scores[f'{score}_std']:.4f}" for score in SCORES]
        rows.append(["mean of the training masks, cut at 1/2", "ours", test, *shown, ""])
    for row in segmenters:
        runs = results.get(row, [])
        name = title(row.removesuffix("-l1")) + (" + l1" if row.endswith("-l1") else "")
        if not runs:
            rows.append([name, "ours", NOT_RUN, "", "", "", ""])
        tests = runs[0]["tests"] if runs else []
        for index, test in enumerate(tests):
            suffix = f"/dataloader_idx_{index}" if len(tests) > 1 else ""
            for run in runs:
                if last(run, f"val_{SCORES[0]}{suffix}") is None:
                    continue  # it has not come to the end of an epoch
                scores = [
                    f"{last(run, f'val_{score}{suffix}'):.4f} ± {last(run, f'val_{score}_std{suffix}'):.4f}"
                    for score in SCORES
                ]
                rows.append([f"{name}, width {run['network']['width']}", f"ours, seed {run['seed']}", test, *scores])
                rows[-1].append(epochs([run]).split(",")[0])
    return table(["", "whose", "test set", *SCORES, "trained"], rows)


def measured_by(measured: dict[str, Any]) -> str:
    """The command, commit, versions and machine of a measurement that is not a run."""
    where = measured["machine"]
    versions = f"dsc_ops {where['dsc_ops']['version']}, torch {where['dsc_ops']['torch']}"
    return f"`{measured['command']}`, commit {measured['commit']}, {versions}, {where['processor']}"


def throughput_table(output: Path) -> str:
    path = output / "throughput.json"
    if not path.exists():
        return f"{NOT_RUN.capitalize()}: `python -m examples.throughput` measures it.\n"
    measured = json.loads(path.read_text())
    contenders, rows = measured["contenders"], []
    for entry in measured["results"]:
        speeds = entry["images_per_second"]
        pairs = (("fused", "plain"), ("fused", "eager"), ("bfloat16", "plain"))
        ratios = [f"{speeds[one] / speeds[other]:.2f}" for one, other in pairs]
        name = f"{NETWORKS[entry['network']]}, batch {entry['batch']}, {entry['size']} x {entry['size']}"
        rows.append(
            [name, *(f"{speeds[contender]:.1f}" for contender in contenders), *ratios, f"{entry['density']:.2f}"]
        )
    header = [
        "",
        *(f"{contender}, images/s" for contender in contenders),
        "fused / plain",
        "fused / eager",
        "bfloat16 / plain",
        "density of codes",
    ]
    note = (
        f"Medians of {measured['repeats']} rounds in which they take turns; threads: {measured['threads']}; Unet of "
        f"width {measured['unet_width']}. Fused and eager have a LISTAConv in place of the first block, plain has the "
        f"paper's, bfloat16 is plain under autocast. By {measured_by(measured)}.\n\n"
    )
    return note + table(header, rows)


def family_tables(results: Results) -> str:
    """A table for each paper of the convolutional sparse coding family, and whether its order is that of our runs."""
    texts = []
    for family in csc_tables.FAMILIES:
        rows, accuracies = [], {}
        for entry in family.entries:
            runs = results.get(entry.row, [])
            scores = [value for run in runs if (value := last(run, "val_accuracy")) is not None]
            if scores:
                accuracies[entry.row] = fmean(scores)
            paper = "" if entry.paper is None else f"{entry.paper:.2f}"
            rows.append([entry.title, f"`{entry.row}`", paper, over_seeds(runs, "val_accuracy", 100), epochs(runs)])
        verdicts = [f"- {csc_tables.verdict(family, chain, accuracies)}\n" for chain in family.chains]
        shown = table(["", "row", "paper, %", "ours, %", "trained"], rows)
        texts.append(f"### {family.source}\n\n{shown}\n{''.join(verdicts)}\n{family.note}".rstrip() + "\n")
    denoised = [
        [row, over_seeds(results.get(row, []), "val_psnr"), epochs(results.get(row, []))]
        for row in csc_tables.DENOISERS
    ]
    texts.append("### CSCNet: Simon, Elad, NeurIPS 2019\n\n" + table(["row", "ours, dB", "trained"], denoised))
    return "\n".join(texts)


def robust_table(output: Path) -> str:
    path = output / "robust.json"
    if not path.exists():
        return f"{NOT_RUN.capitalize()}: `python -m examples.robust RUN --output {output}` measures it.\n"
    found, rows = json.loads(path.read_text()), []
    points = [(name, point) for name, values in found["corruptions"].items() for point in values["points"]]
    for name, point in [*points, *found.get("attacks", {}).items()]:
        kind = f"{name} {point['level']:g}" if "level" in point else name
        ours = [f"{100 * point['as_trained']:.2f}", f"{100 * point['adapted']:.2f}", f"{point['lambda']:.2f}"]
        paper = ["" if number is None else f"{number:.2f}" for number in csc_tables.PAPER_ROBUST[name]]
        rows.append([kind, *ours, *paper])
    header = [
        "",
        "ours, as trained",
        "ours, adapted",
        "lambda",
        "paper, ResNet-18",
        "paper, SDNet-18",
        "paper, adapted",
    ]
    better = sum(point["adapted"] > point["as_trained"] for _, point in points)
    note = (
        f"`{found['row']}` after {found['epochs']} epochs, {found['pictures']} test pictures, accuracies in %; "
        f"without noise {100 * found['clean']:.2f}. The paper's are means over the severities of CIFAR-10-C, which is "
        "other noise. The adapted lambda, which is the paper's point, is better than that of the training at "
        f"{better} of {len(points)} levels of noise. By {measured_by(found)}.\n\n"
    )
    return note + table(header, rows) + "\n![Accuracy against lambda](robust.png)\n"


def runs_table(results: Results) -> str:
    rows = []
    for row in ROWS:
        if row not in results and row in DEEP_ROWS:
            rows.append([row, NOT_RUN, *[""] * 6])
        for run in results.get(row, []):
            done = f"{run['epochs']}" + ("" if run["finished"] else f" of {run['planned_epochs']}")
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            where = f"{run['machine']['processor']}, {run['machine']['cores']} cores"
            rows.append([row, str(run["seed"]), done, f"{run['hours']:.2f}", run["data"], run["commit"], versions])
            rows[-1].append(f"{where}; `{run['command']}`")
    return table(["row", "seed", "epochs", "hours", "data", "commit", "versions", "machine and command"], rows)


def page(results: Results, figures: dict[str, str], output: Path) -> str:
    """The whole report in Markdown."""
    drawn = "\n\n".join(f"![{text}]({name}.png)\n\n{text}" for name, text in figures.items())
    return f"""# The papers' experiments: results

Written by `python -m examples.report` from the logs of `python -m examples.train`; nothing here is edited by hand. "The
paper" is Li, Feng, Zhou, arXiv 2408.05540, section 4, except where another is named. Test pictures are scored after the
last epoch, and none was chosen by its score. ± is the standard deviation over seeds, in Table 4 over images.

## Tables 1 and 2: CIFAR-10

The paper trains for 200 epochs. Of these tables we know the paper's gammas, which are ours too, but not its
accuracies, so they are left out. Density is the fraction of values above 1e-6 in size in the output of each block, from
the first to the last, averaged over test pictures; that of elu and mish, which have no zeros to speak of, is near 1.

{classification_table(results)}
## Table 4: salient objects

The paper's numbers are of 200 epochs on DUTS-TR. Ours name their test set: composites are not DUTS, and their scores
cannot be compared with the paper's, only with each other.

{segmentation_table(results)}
## Convolutional sparse coding networks

Numbers in the column "paper" are the papers', which train for 150 to 220 epochs on other machines. Ours are of as many
epochs as the last column says, and of few seeds: differences of less than a point between them may be chance.

{family_tables(results)}
### SDNet: robust inference

{robust_table(output)}
## Figures

{drawn or NOT_RUN.capitalize()}

## Throughput of a training step

{throughput_table(output)}
## Runs

{runs_table(results)}"""


def run(options: argparse.Namespace) -> Path:
    """Collect, draw, write; the path of the page."""
    from benchmarks.machine import write_whole
    from examples import paper_figures

    results = gather(options.runs, options.output)
    figures = paper_figures.draw(results, options.runs, options.output)
    write_whole(options.output / "README.md", page(results, figures, options.output))
    return options.output / "README.md"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    require_extras()
    print(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
