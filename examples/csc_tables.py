"""What the papers of the convolutional sparse coding family report, and in which order: data of the report.

Numbers are accuracies in %, the papers'; None where we know of none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Entry:
    """A row of a table: the name of its config, what it is, and the paper's accuracy."""

    row: str
    title: str
    paper: float | None = None


@dataclass(frozen=True)
class Family:
    """A paper's networks, and chains of rows, each above the next: as in the paper, or as its larger networks."""

    source: str
    entries: Sequence[Entry]
    chains: Sequence[Sequence[str]]
    note: str = ""


ML_METHODS = {"ml-ista": 82.93, "ml-fista": 82.79, "ml-lista": 82.68, "layered-ista": 80.73, "cnn": 79.00}
ML_TITLES = {
    "ml-ista": "ML-ISTA",
    "ml-fista": "ML-FISTA",
    "ml-lista": "ML-LISTA",
    "layered-ista": "layered ISTA",
    "cnn": "CNN",
}
RES_PAPER = {
    "rescsc": ("Res-CSC", {20: 91.82, 56: 93.55, 110: 93.56, 218: 94.28}),
    "resnet": ("ResNet", {20: 91.30, 56: 93.15, 110: 93.41, 218: 94.02}),
    "simplified": ("Res-CSC simplified", {20: 91.86, 56: 88.75}),
    "plain": ("plain", {20: 90.74, 56: 87.04}),
}


def _unfolded(name: str, start: str, numbers: Mapping[str, float | None], titles: str) -> list[Entry]:
    """Rows of 0, 1, 2 unfoldings, and 2 of FISTA."""
    words = {"0": "no unfolding", "1": "1 unfolding", "2": "2 unfoldings", "2-fista": "2 unfoldings of FISTA"}
    return [Entry(start if key == "0" else f"{name}-{key}", f"{titles}, {words[key]}", n) for key, n in numbers.items()]


FAMILIES = (
    Family(
        "ML-ISTA: Sulam et al., TPAMI 2019; 6 unfoldings",
        [Entry(f"mlcsc-cifar-{method}", ML_TITLES[method], number) for method, number in ML_METHODS.items()],
        [[f"mlcsc-cifar-{method}" for method in ML_METHODS]],
    ),
    Family(
        "ML-ISTA on MNIST: Sulam et al., TPAMI 2019; ours are 4000 + 1000 of its digits",
        [Entry(f"mlcsc-mnist-{method}", ML_TITLES[method]) for method in ML_METHODS],
        [],
    ),
    Family(
        "ML-CSC of six layers: Zhang, Zhang, National Science Review 2021",
        _unfolded("mlcsc6", "mlcsc6-0", {"0": 82.16, "1": 83.26, "2": 83.59, "2-fista": 84.06}, "ML-CSC"),
        [["mlcsc6-2-fista", "mlcsc6-2", "mlcsc6-1", "mlcsc6-0"]],
    ),
    Family(
        "MSD-CSC: Zhang, Zhang, National Science Review 2021",
        [
            *_unfolded("msdcsc6", "msdnet6", {"0": None, "1": None, "2": None}, "d = 6"),
            *_unfolded("msdcsc9", "msdnet9", {"0": None, "1": None, "2": None}, "d = 9"),
            *_unfolded("msdcsc12", "msdnet12", {"0": 90.35, "1": 90.81, "2": 91.76, "2-fista": 91.63}, "d = 12"),
            Entry("msdcsc-blocks", "the authors' code, three blocks, 1 unfolding"),
        ],
        [
            ["msdcsc12-2", "msdcsc12-2-fista", "msdcsc12-1", "msdnet12"],
            *([f"msdcsc{d}-2", f"msdcsc{d}-1", f"msdnet{d}"] for d in (6, 9)),
        ],
        "Of d = 6 and 9 we know no numbers of the paper.",
    ),
    Family(
        "Res-CSC: Zhang, Zhang, National Science Review 2021",
        [
            Entry(f"{name}-{layers}", f"{title}, {layers} layers", number)
            for name, (title, numbers) in RES_PAPER.items()
            for layers, number in numbers.items()
        ],
        [
            ["simplified-20", "rescsc-20", "resnet-20", "plain-20"],
            ["rescsc-56", "resnet-56", "simplified-56", "plain-56"],
            ["rescsc-110", "resnet-110"],
            ["rescsc-218", "resnet-218"],
        ],
    ),
    Family(
        "SDNet: Dai et al., NeurIPS 2022",
        [
            Entry("resnet18", "ResNet-18", 95.54),
            Entry("sdnet18", "SDNet-18, stem", 95.20),
            Entry("sdnet18-all", "SDNet-18, all convolutions", 95.02),
            Entry("sdnet18-all-no-shortcut", "SDNet-18, all, no shortcut", 94.89),
            Entry("resnet34", "ResNet-34"),
            Entry("sdnet34", "SDNet-34, stem"),
            Entry("sdnet34-all", "SDNet-34, all convolutions"),
            Entry("sdnet34-all-no-shortcut", "SDNet-34, all, no shortcut"),
            Entry("resnet10", "ResNet-10, width 16"),
            Entry("sdnet10", "SDNet-10, width 16, stem"),
        ],
        [["resnet18", "sdnet18", "sdnet18-all", "sdnet18-all-no-shortcut"], ["resnet10", "sdnet10"]],
        "The paper's ablation has 95.34 for the stem. Networks of 10 layers are ours, for CPUs.",
    ),
    Family(
        "SDNet on ImageNet: Dai et al., NeurIPS 2022",
        [Entry(f"sdnet{layers}-imagenet", f"SDNet-{layers}, stem") for layers in (18, 34)],
        [],
    ),
)
# SDNet: accuracy on CIFAR-10-C over all severities, and under PGD: ResNet-18, SDNet-18, SDNet-18 with adapted lambda.
PAPER_ROBUST = {
    "gaussian": (44.43, 50.58, 64.92),
    "shot": (57.88, 63.29, 71.13),
    "speckle": (62.16, 67.11, 71.42),
    "impulse": (51.72, 54.13, 57.48),
    "PGD L_inf 8/255": (None, 0.11, 35.18),
    "PGD L2 0.5": (None, 29.95, 62.80),
}
DENOISERS = ("cscnet-25",)  # scored by PSNR
ROWS = (*(entry.row for family in FAMILIES for entry in family.entries), *DENOISERS)


def verdict(family: Family, chain: Sequence[str], accuracies: Mapping[str, float]) -> str:
    """Whether our accuracies have the order of a chain, best first; of rows that were not run, nothing is said."""
    entries = {entry.row: entry for entry in family.entries}

    def order(rows: Sequence[str]) -> str:
        return " > ".join(entries[row].title for row in rows)

    known = all(entries[row].paper is not None for row in chain)
    published = f"{'Published' if known else 'As published of larger networks'}: {order(chain)}."
    rows = [row for row in chain if row in accuracies]
    if len(rows) < 2:
        return f"{published} Not run."
    ours = order(sorted(rows, key=accuracies.__getitem__, reverse=True))
    pairs = list(combinations(rows, 2))
    right = sum(accuracies[better] > accuracies[worse] for better, worse in pairs)
    word = "Reproduced" if right == len(pairs) else "Not reproduced"
    missing = "" if len(rows) == len(chain) else f"; {len(chain) - len(rows)} not run"
    return f"{published} Ours: {ours}. {word}: {right} of {len(pairs)} pairs have the order{missing}."
