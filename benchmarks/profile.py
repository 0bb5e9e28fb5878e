"""What holds each CPU kernel back, by two profilers: `python -m benchmarks --profile`.

A training step of a case runs on one thread in two processes of their own: under perf, which samples where the time
goes, and under callgrind, which counts instructions, misses of the first-level data cache and mispredicted branches, in
its models of this machine's cache and of a simple branch predictor. The counts are the same in every run, whatever
else the machine does; a part of the batch is enough for them. A large matrix product goes the same way: its
instructions each nanosecond are what the machine carries out when nothing is in the way, and a kernel far below that
rate waits.

Callgrind knows no AVX-512. There perf goes alone, and what is counted is the multiply-adds that the non-zeros call for
(A_W: all taps; where it multiplies pixels in pairs it makes fewer), with the bytes of the tables of atoms that they
take from a cache and bring there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cases import Case, Problem, problem
from benchmarks.contenders import call, contender
from benchmarks.timing import FUSED
from dsc_ops import _library

TOOLS = {
    "perf": "linux-perf",
    "valgrind": "valgrind",
    "callgrind_control": "valgrind",
    "callgrind_annotate": "valgrind",
}
# Kernels by a part of their functions' names, in this order; what matches none is "the rest".
KERNELS = {
    "S_D": r"packed_synthesis<|(Sliding|ColumnByColumn)<.*::add<true[,.] false[,.] false>",  # perf writes points
    "A_W, threshold, pack": r"(packed_analysis(_by)?|analyze_tile)<|sum_columns<",
    "dW, dtheta, S_W": r"packed_backward_analysis<|SumAtomsAndGradient<|(Sliding|ColumnByColumn)<.*::add<",
    "dD, dx": r"packed_backward_synthesis<|DotAtoms<|(Sliding|ColumnByColumn)<.*::subtract<",
    "dense codes in and out": r"packed_(to|from)_dense<",
}
REST = "the rest"
PRODUCT = "sgemm"
SIDE = 1024  # of its matrices
COUNTED = 4096  # code pixels are enough for callgrind; the cases' batches are cut to as many, or to one signal
SECONDS = 3.0  # of sampling
EVENTS = ("Ir", "D1mr", "D1mw", "Bcm")
HEAD = (
    "| case | kernel | time | ns | instructions | each ns | of sgemm's | L1 misses | mispredicted |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)
HEAD_OF_PRODUCTS = (
    "| case | kernel | time | ns | multiply-adds | each ns | of sgemm's | bytes read each ns | written each ns |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)
# Products of a kernel with all taps, for each non-zero: how many read a table of atoms, and how many also write one.
READS = {"S_D": (1, 0), "dW, dtheta, S_W": (2, 1), "dD, dx": (2, 1)}


def counts_instructions() -> bool:
    """Whether callgrind runs the instructions that the kernels run here."""
    return not _library.information()["cpu_capability"].startswith("avx512")


def missing() -> str:
    """A sentence about tools that are not here; empty when all are."""
    needed = TOOLS.items() if counts_instructions() else [("perf", TOOLS["perf"])]
    absent = sorted({package for tool, package in needed if not shutil.which(tool)})
    return (
        f"--profile needs {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not here"
        if absent
        else ""
    )


def kernel_of(function: str) -> str:
    return next((kernel for kernel, pattern in KERNELS.items() if re.search(pattern, function)), REST)


def shares(report: str) -> dict[str, float]:
    """Share of the samples in each kernel, from `perf report -t,` with the fields overhead and symbol."""
    found = dict.fromkeys((*KERNELS, REST), 0.0)
    for line in report.splitlines():
        if match := re.match(r"\s*([\d.]+)%\s*,(.*)", line):
            found[kernel_of(match[2])] += float(match[1]) / 100
    return found


def counts(report: str) -> dict[str, dict[str, int]]:
    """The events of each kernel, from `callgrind_annotate --show=` with :data:`EVENTS`."""
    found = {kernel: dict.fromkeys(EVENTS, 0) for kernel in (*KERNELS, REST)}
    number = r"\s*([\d,]+|\.)(?: \(\s*[\d.]+%\))?"
    for line in report.splitlines():
        match = re.match(number * len(EVENTS) + r"\s+(\S*:.*)", line)
        if match:
            values = [0 if value == "." else int(value.replace(",", "")) for value in match.groups()[:-1]]
            kernel = found[kernel_of(match[len(EVENTS) + 1])]
            for event, value in zip(EVENTS, values, strict=True):
                kernel[event] += value
    return found


def in_child(tool: str, task: Problem | None, folder: Path) -> dict[str, Any]:
    """What a child under a tool measured of a training step, or of a matrix product where there is no task."""
    file, output = folder / "problem.pt", folder / f"{tool}.out"
    torch.save(task, file)
    command = [sys.executable, "-m", "benchmarks.profile", tool, str(file), str(output)]
    if tool == "callgrind":
        options = ["--instr-atstart=no", "--cache-sim=yes", "--branch-sim=yes", f"--callgrind-out-file={output}"]
        command = ["valgrind", "-q", "--tool=callgrind", *options, *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process under {tool} failed: {done.stderr.strip()[-500:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    if tool == "callgrind":
        options = ["--threshold=100", f"--show={','.join(EVENTS)}", "--auto=no"]
        return said | {"counts": counts(text_of("callgrind_annotate", *options, str(output)))}
    options = ["--stdio", "--no-children", "-F", "overhead,symbol", "-t", ",", "-i", str(output)]
    return said | {"shares": shares(text_of("perf", "report", *options))}


def text_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def work(file: str) -> tuple[Callable[[], Any], int]:
    """What a child runs, and by how many pixels and iterations its results are divided."""
    task = torch.load(file, weights_only=False)  # written by the parent a moment ago
    torch.set_num_threads(1)
    if task is None:
        a, b, c = (torch.rand(SIDE, SIDE) for _ in range(3))
        return lambda: torch.mm(a, b, out=c), 1
    pixels = task.code.numel() // task.case.atoms
    return call(contender(FUSED, task.case), task, "training"), pixels * len(task.analysis)


def child(tool: str, file: str, output: str) -> dict[str, Any]:
    """Run the work once to warm up, then under the tool, which is switched on and off from here."""
    run, units = work(file)
    run()
    if tool == "callgrind":
        for switch in ("on", "off"):
            subprocess.run(["callgrind_control", "-i", switch, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
            if switch == "on":
                run()
        return {"units": units}
    seconds = min(processor_seconds(run) for _ in range(5))
    options = ["-q", "-F", "1999", "-e", "cpu-clock", "-o", output, "-p", str(os.getpid())]
    profiler = subprocess.Popen(["perf", "record", *options], stdout=subprocess.DEVNULL)
    time.sleep(0.5)  # until it has found the process
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        run()
    profiler.send_signal(signal.SIGINT)
    profiler.wait()
    return {"units": units, "seconds": seconds}


def processor_seconds(run: Callable[[], Any]) -> float:
    """Of one call; what else the machine does has little part in them."""
    start = time.process_time()
    run()
    return time.process_time() - start


def rows_of(name: str, density: float | None, sampled: dict[str, Any], counted: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each kernel of a case: nanoseconds and events by pixel and iteration."""
    rows = []
    for kernel, share in sampled["shares"].items():
        events = counted["counts"][kernel]
        instructions = events["Ir"] / counted["units"]
        nanoseconds = share * sampled["seconds"] * 1e9 / sampled["units"]
        misses = (events["D1mr"] + events["D1mw"]) / counted["units"]
        rows.append(
            {
                "section": "profile",
                "case": name,
                "density": density,
                "kernel": kernel,
                "share": share,
                "nanoseconds": nanoseconds,
                "instructions": instructions,
                "misses": misses,
                "mispredicted": events["Bcm"] / counted["units"],
                "rate": instructions / nanoseconds if nanoseconds else 0.0,
            }
        )
    return rows


def rows_of_products(task: Problem, sampled: dict[str, Any]) -> list[dict[str, Any]]:
    """The same by multiply-adds, and bytes of tables of atoms and of their gradients, of float32."""
    pixels, taps = task.code.numel() // task.case.atoms, task.dictionary[0].numel()
    old, new = sum(task.counts[:-1]) / pixels / len(task.analysis), sum(task.counts[1:]) / pixels / len(task.analysis)
    again = 16 * task.signal.numel() > task.code.numel()  # residuals are made again in backward
    products = {
        "S_D": (1 + again) * taps * old,
        "A_W, threshold, pack": float(taps * task.case.atoms),
        "dW, dtheta, S_W": 2 * taps * new,
        "dD, dx": 2 * taps * old,
    }
    rows = []
    for kernel, share in sampled["shares"].items():
        nanoseconds = share * sampled["seconds"] * 1e9 / sampled["units"]
        reads, writes = READS.get(kernel, (0, 0))
        done = products.get(kernel, 0.0)
        moved = 4 * done / max(reads, 1)  # of one table
        rows.append(
            {
                "section": "profile",
                "case": task.case.name,
                "density": task.density,
                "kernel": kernel,
                "share": share,
                "nanoseconds": nanoseconds,
                "products": done,
                "rate": done / nanoseconds if nanoseconds else 0.0,
                "read": reads * moved / nanoseconds if nanoseconds else 0.0,
                "written": writes * moved / nanoseconds if nanoseconds else 0.0,
            }
        )
    return rows


def product_row() -> dict[str, Any]:
    """The matrix product as one row: all of it, whatever its functions are called."""
    with tempfile.TemporaryDirectory() as folder:
        if not counts_instructions():
            seconds = in_child("perf", None, Path(folder))["seconds"]
            rate = float(SIDE) ** 3 / seconds / 1e9
            return {"section": "profile", "case": PRODUCT, "products": float(SIDE) ** 3, "rate": rate}
        sampled, counted = (in_child(tool, None, Path(folder)) for tool in ("perf", "callgrind"))
    whole = {event: sum(events[event] for events in counted["counts"].values()) for event in EVENTS}
    return rows_of(PRODUCT, None, sampled | {"shares": {PRODUCT: 1.0}}, counted | {"counts": {PRODUCT: whole}})[0]


def measure(case: Case, density: float = 0.1, iterations: int = 10) -> list[dict[str, Any]]:
    """The rows of one case."""
    task = problem(case, density, iterations)
    if not counts_instructions():
        with tempfile.TemporaryDirectory() as folder:
            return rows_of_products(task, in_child("perf", task, Path(folder)))
    pixels = task.code.numel() // case.atoms
    part = problem(case.scaled(max(1, case.batch * COUNTED // pixels)), density, iterations)
    with tempfile.TemporaryDirectory() as folder:
        sampled = in_child("perf", task, Path(folder))
        counted = in_child("callgrind", part, Path(folder))
    return rows_of(case.name, task.density, sampled, counted)


def lines(rows: Sequence[dict[str, Any]], peak: float | None) -> list[str]:
    """Rows of a Markdown table; the rate is also told as a share of the matrix product's."""
    told = []
    for row in rows:
        if row["case"] == PRODUCT:
            told.append(f"| {PRODUCT} | {SIDE} x {SIDE} | 100 % | | | {row['rate']:.1f} | 100 % | | |")
            continue
        of_peak = f"{100 * row['rate'] / peak:.0f} %" if peak else ""
        if "products" in row:
            cells = [f"{100 * row['share']:.0f} %", f"{row['nanoseconds']:.1f}", *[""] * 5]
            if row["products"]:
                cells[2:5] = f"{row['products']:.0f}", f"{row['rate']:.1f}", of_peak
            if row["read"]:
                cells[5:] = f"{row['read']:.0f}", f"{row['written']:.0f}" if row["written"] else ""
            told.append("".join(f"| {cell} " if cell else "| " for cell in (row["case"], row["kernel"], *cells)) + "|")
            continue
        told.append(
            f"| {row['case']} | {row['kernel']} | {100 * row['share']:.0f} % | {row['nanoseconds']:.1f} "
            f"| {row['instructions']:.0f} | {row['rate']:.1f} | {of_peak} | {row['misses']:.1f} "
            f"| {row['mispredicted']:.2f} |"
        )
    return told


def head(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    return HEAD_OF_PRODUCTS if any("products" in row for row in rows) else HEAD


def measure_all(cases: Sequence[Case], density: float, iterations: int) -> list[dict[str, Any]]:
    """The rows of the matrix product and of these cases, each told when it is there: callgrind takes its time."""
    rows = [product_row()]
    peak = rows[0]["rate"]
    tqdm.write("\n".join((*head(rows), *lines(rows, peak))), file=sys.stdout)
    for case in tqdm(cases, desc="profiling", unit="case"):
        found = measure(case, density, iterations)
        tqdm.write("\n".join(lines(found, peak)), file=sys.stdout)
        rows += found
    return rows


def page(rows: Sequence[dict[str, Any]], facts: dict[str, Any], density: float, iterations: int) -> str:
    """The table with what made it."""
    software = facts["dsc_ops"]
    peak = next((row["rate"] for row in rows if row["case"] == PRODUCT), None)
    table = "\n".join((*head(rows), *lines(rows, peak)))
    told = (
        "Nanoseconds of processor time by perf, and multiply-adds that the non-zeros call for, and all taps in A_W, of "
        "each code pixel and iteration; multiply-adds each nanosecond, also as a share of those of a large matrix "
        "product, beyond which A_W can go, since pairs of pixels take down to two thirds of them; bytes that the "
        "sparse products read of tables of atoms and their gradients each nanosecond, and write."
        if head(rows) is HEAD_OF_PRODUCTS
        else "Nanoseconds of processor time, instructions, misses of the first-level data cache and mispredicted "
        "branches for each code pixel and iteration; instructions each nanosecond, also as a share of those of a large "
        "matrix product."
    )
    text = (
        f"`python -m benchmarks --profile` on {facts['processor']}, {software['cpu_capability']}, torch "
        f"{software['torch']}, {facts['date']}: a training step of {iterations} iterations at density {density:g}, one "
        f"thread. {told}"
    )
    return f"# What the kernels wait for\n\n{textwrap.fill(text, 120, break_on_hyphens=False)}\n\n{table}\n"


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
