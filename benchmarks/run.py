"""What is measured, in which order, as rows of one table: `python -m benchmarks --help`.

A plan is a list of steps; a step measures one row. A row has what identifies it (:data:`IDENTITY`), the contenders with
their medians and spread, the fastest baseline and the ratio to it. All baselines take part at the first density of a
case; their times do not depend on the density, so at the others the fused operator meets the fastest of them alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import csc, memory, operators, peers
from benchmarks.cases import CASES, DENSITIES, SETTINGS, Case
from benchmarks.contenders import BASELINES, MODES
from benchmarks.machine import machine, machine_name, write_whole
from benchmarks.timing import FUSED, limits, torch_threads
from benchmarks.unrolled import measure, two_threads

Row = dict[str, Any]

IDENTITY = (
    "section",
    "case",
    "operator",
    "layer",
    "batch",
    "setting",
    "mode",
    "iterations",
    "density_asked",
    "above",
    "threads",
    "dtype",
)
ON_GPU = ("cases", "memory", "operators", "csc")  # sections that mean something there
SECTIONS = {
    "cases": "one step and K unrolled ones, forward and with gradients, against all baselines",
    "threads": "two threads against one",
    "memory": "peak memory of a training step, and against K",
    "operators": "single operators, forward and backward",
    "calls": "what a layer call adds to its operator",
    "csc": "convolutional sparse coding layers against their plain writings, time and memory of a training step",
    "peers": "time to the same lasso objective: sporco, our ista(fast=True), eager FISTA",
}
SWEPT = ("denoise-gray", "stem-cifar")  # cases whose memory is measured for several K


@dataclass(frozen=True)
class Plan:
    """What to measure; the start values are a whole run."""

    sections: Sequence[str] = tuple(SECTIONS)
    cases: Sequence[Case] = tuple(CASES.values())
    settings: Sequence[str] = SETTINGS
    densities: Sequence[float] = (0.1, *(p for p in DENSITIES if p != 0.1))
    iterations: Sequence[int] = (10, 1)
    modes: Sequence[str] = tuple(reversed(MODES))
    baselines: Sequence[str] = BASELINES
    memory_iterations: Sequence[int] = memory.ITERATIONS
    threads: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    repeats: int = 5
    above: Sequence[float] = (1e-2, 1e-3)
    shape: Sequence[int] = operators.ELEMENTWISE  # of the elementwise operators' input
    peer_size: int = 192

    def on(self, device: str) -> Plan:
        """The same on another device, in the sections that mean something there; GPUs are fast: twice the rounds."""
        if device == "cpu":
            return self
        sections = [name for name in self.sections if name in ON_GPU]
        return replace(self, device=device, sections=sections, repeats=2 * self.repeats)

    def quick(self) -> Plan:
        """What --check compares: the first density and setting, unrolled, without compilation, csc and peers."""
        return replace(
            self,
            sections=[name for name in self.sections if name not in ("calls", "csc", "peers")],
            settings=self.settings[:1],
            densities=self.densities[:1],
            iterations=self.iterations[:1],
            baselines=[name for name in self.baselines if name != "compile"],
            memory_iterations=(),
            repeats=min(self.repeats, 3),
        )


@dataclass(frozen=True)
class Step:
    """One row to measure: a function and its options."""

    section: str
    function: Callable[..., Row]
    options: dict[str, Any]

    def run(self, **options: Any) -> Row:
        return {"section": self.section} | self.function(**(self.options | options))

    def __str__(self) -> str:
        named = {
            "name": "",
            "baseline": "over ",
            "mode": "",
            "iterations": "K=",
            "density": "p=",
            "setting": "",
            "above": "",
        }
        case = self.options.get("case")
        known = [f"{sign}{self.options[name]}" for name, sign in named.items() if name in self.options]
        return " ".join([self.section, *([case.name] if case else []), *known])


def identity(row: Row) -> tuple:
    """What two rows of the same measurement have in common."""
    return tuple(row.get(name) for name in IDENTITY)


def steps(plan: Plan) -> list[Step]:
    """All rows of a plan, in the order of measuring."""
    makers = (case_steps, thread_steps, memory_steps, operator_steps, call_steps, csc_steps, peer_steps)
    wanted = [make for name, make in zip(SECTIONS, makers, strict=True) if name in plan.sections]
    return [step for make in wanted for step in make(plan)]


def case_steps(plan: Plan) -> Iterator[Step]:
    """Every density on the first setting, the first density on the others."""
    signals = [(plan.settings[0], density) for density in plan.densities]
    signals += [(setting, plan.densities[0]) for setting in plan.settings[1:]]
    common = {name: getattr(plan, name) for name in ("repeats", "threads", "dtype", "device", "baselines")}
    for case, (setting, density) in product(plan.cases, signals):
        for iterations, mode in product(plan.iterations, plan.modes):
            options = {"case": case, "setting": setting, "density": density, "iterations": iterations, "mode": mode}
            yield Step("cases", measure, options | common)


def thread_steps(plan: Plan) -> Iterator[Step]:
    for case in plan.cases if (plan.threads or torch.get_num_threads()) > 1 else ():
        yield Step("threads", two_threads, {"case": case, "density": plan.densities[0], "repeats": plan.repeats})


def memory_steps(plan: Plan) -> Iterator[Step]:
    """All baselines at the first K, which all cases are measured at; eager alone at the others."""
    common = {"density": plan.densities[0], "threads": plan.threads, "device": plan.device}
    for case, iterations in product(plan.cases, dict.fromkeys((plan.iterations[0], *plan.memory_iterations))):
        first = iterations == plan.iterations[0]
        if first or case.name in SWEPT:
            options = {"case": case, "iterations": iterations, "baselines": plan.baselines if first else ("eager",)}
            yield Step("memory", memory.measure, options | common)


def operator_steps(plan: Plan) -> Iterator[Step]:
    for name in operators.OPERATORS:
        elementwise = name not in operators.CONVOLUTIONAL
        for case in [None] if elementwise else [case for case in plan.cases if case.spatial]:
            for mode in ("forward", "backward"):
                options = {"name": name, "mode": mode, "case": case, "shape": plan.shape, "threads": plan.threads}
                yield Step("operators", operators.measure, options | {"device": plan.device})


def call_steps(plan: Plan) -> Iterator[Step]:
    for name in operators.LAYERS:
        yield Step("calls", operators.overhead, {"name": name})


def csc_steps(plan: Plan) -> Iterator[Step]:
    common = {name: getattr(plan, name) for name in ("repeats", "threads", "device")}
    for name, block in csc.BLOCKS.items():
        for mode, baseline in product(csc.MODES, block.baselines):
            yield Step("csc", csc.measure, {"name": name, "baseline": baseline, "mode": mode} | common)


def peer_steps(plan: Plan) -> Iterator[Step]:
    for above in plan.above:
        yield Step("peers", peers.measure, {"size": plan.peer_size, "above": above, "threads": plan.threads})


def cell(entry: dict[str, Any], unit: float, name: str) -> str:
    return f"{entry['median'] * unit:10.1f} {name} ±{entry['iqr'] / entry['median']:4.0%}"


def line(row: Row, best: dict[str, float]) -> str:
    """One line of the printed table; ``best`` are the machine's limits."""
    if row["section"] == "calls":
        times = ", ".join(f"{what} {value:.1f} us" for what, value in row["microseconds"].items())
        return f"{row['layer']:20}{times}; the call adds {row['added']:.1f} us"
    what = row.get("operator") or {"cases": "", "peers": f"to {row.get('above', 0):.1%}"}.get(
        row["section"], row["section"]
    )
    start = f"{row['case']:16}{what:20}{row.get('mode', ''):9}"
    start += f"{row['iterations']:4}" if "iterations" in row else f"{'':4}"
    start += f"{row['density']:7.3f}{row['mean_density']:7.3f}" if "mean_density" in row else f"{'':14}"
    unit = (2**-20, "MiB") if "memory" in (row["section"], row.get("mode")) else (1e3, "ms")
    fused, other = (row["contenders"][name] for name in (FUSED, row["fastest"]))
    text = f"{start}{cell(fused, *unit)}{cell(other, *unit)} {row['fastest']:14}{row['ratio']:6.2f}x"
    if "dense_gflops" in row:
        text += f"  gemm {row['dense_gflops'] / best['gemm_gflops']:4.0%}"
    if "true_gflops" in row:
        text += f" (true {row['true_gflops'] / best['gemm_gflops']:4.0%})"
    if "gbs" in row:
        text += f"  copy {row['gbs'] / best['copy_gbs']:4.0%} (new {row['gbs'] / best['new_copy_gbs']:4.0%})"
    if "predicted_seconds" in row:
        predicted = row["predicted_seconds"]
        text += f"  roofline {predicted * 1e3:.2f} ms predicted, {predicted / fused['median']:4.0%} of it reached"
    return text + (f"  {row['setting']}" if "setting" in row else "")


HEADER = (
    f"{'case':16}{'':20}{'mode':9}{'K':>4}{'p':>7}{'mean p':>7}{'fused':>18}{'fastest baseline':>29}{'ratio':>10}"
    "  fraction of the machine's limits"
)


def say(text: str) -> None:
    """A line on the screen beside the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def run(plan: Plan) -> dict[str, Any]:
    """Measure all rows of a plan, print each, and return them with the machine and its limits."""
    with torch_threads(plan.threads):
        facts = machine(plan.device)
    # Most processors compute 16-bit dtypes in float32, and library products of theirs can be very slow.
    best = limits(plan.threads, plan.dtype if plan.dtype.itemsize >= 4 else torch.float32, plan.device)
    name = facts["gpu"]["name"] if "gpu" in facts else f"{facts['processor']}, threads: {best['threads']}"
    say(
        f"{name}, {best['dtype']}: matrix product {best['gemm_gflops']:.0f} "
        f"GFLOP/s, copy {best['copy_gbs']:.1f} GB/s, into a new tensor {best['new_copy_gbs']:.1f} GB/s"
    )
    if "gemm_tf32_gflops" in best:
        say(f"TensorFloat-32 is off for all contenders; with it a matrix product has {best['gemm_tf32_gflops']:.0f}.")
    say(HEADER)
    if "threads" in plan.sections and best["threads"] < 2:
        say("Two threads against one is left out: there is one thread.")
    rows: list[Row] = []
    settled: dict[tuple, str] = {}  # the fastest baseline by case, mode and iterations
    told, failed = set(), []
    with tqdm(steps(plan), disable=None, unit="row") as bar:
        for step in bar:
            bar.set_postfix_str(str(step))
            key = tuple(step.options.get(name) for name in ("case", "mode", "iterations"))
            known = step.section == "cases" and key in settled
            try:
                row = step.run(**({"baselines": [settled[key]]} if known else {}))
            except RuntimeError as error:  # results that differ, a child that was killed: the other rows are worth it
                failed.append(f"{step}: {error}")
                say(f"FAILED  {failed[-1]}")
                continue
            rows.append(row)
            if step.section == "cases":
                settled[key] = row["fastest"]
            for sentence in [f"{name} is left out: {reason}" for name, reason in row.get("left_out", {}).items()]:
                if sentence not in told:
                    say(sentence)
                told.add(sentence)
            say(line(row, best))
    return {"machine": facts | {"name": machine_name(facts)}, "limits": best, "rows": rows, "failed": failed}


def write(path: Path, results: dict[str, Any]) -> None:
    """One line for each row: a new run changes the lines of what it measured."""
    lines = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    write_whole(path, head.removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')


def read(path: Path) -> dict[str, Any]:
    """Results as they were written; a file of something else ends the program with a sentence."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row, dict) for row in results["rows"]):
            raise TypeError("its rows are no objects")
        return results
    except (OSError, ValueError, TypeError, KeyError) as error:
        sys.exit(f"{path} holds no results of python -m benchmarks: {type(error).__name__}: {error}")
