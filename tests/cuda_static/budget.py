"""The committed budget of every kernel, and how an object breaches it.

budget.json has two parts:

``promises``, written by hand: rules of which the first whose pattern fits a kernel applies to it.

    kernels         a pattern as in a shell, for the names that the table shows
    occupancy       the least per cent of a multiprocessor's warps, on every architecture, or {"sm_80": 50, ...}
    loads128, stores128, copies128, shared128, tensor
                    the least number of instructions: 128-bit loads from and stores to global memory, 128-bit copies
                    from global to shared memory, 128-bit accesses to shared memory, matrix instructions (default 0)
    dynamic_shared  bytes that a launch asks for (default 0)
    threads         of a block (default: the kernel's launch bounds)
    why             a reason, where a promise is low

``kernels``, measured: threads, registers, bytes of static shared memory and occupancy of each kernel, one number for
each of ``architectures``. An object may have less of registers and shared memory, and more occupancy. --update writes
what was measured, and the change is reviewed as a change of this file. Spills and stack have no budget: they are zero.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .objects import Kernel
from .occupancy import Launch, Occupancy, occupancies

FILE = Path(__file__).with_name("budget.json")
INSTRUCTIONS = {
    "loads128": "128-bit loads",
    "stores128": "128-bit stores",
    "copies128": "128-bit copies to shared memory",
    "shared128": "128-bit accesses to shared memory",
    "tensor": "matrix instructions",
}


@dataclass(frozen=True)
class Promise:
    kernels: str
    occupancy: float | dict[str, float]
    loads128: int = 0
    stores128: int = 0
    copies128: int = 0
    shared128: int = 0
    tensor: int = 0
    dynamic_shared: int = 0
    threads: int | None = None
    why: str = ""

    def least_occupancy(self, architecture: str) -> float:
        return self.occupancy.get(architecture, 0) if isinstance(self.occupancy, dict) else self.occupancy

    def fits(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, re.sub(r"\[", "[[]", self.kernels))


@dataclass
class Budget:
    architectures: list[str]
    promises: list[Promise]
    kernels: dict[str, dict[str, Any]]

    def promise(self, name: str) -> Promise | None:
        return next((promise for promise in self.promises if promise.fits(name)), None)


def read(path: Path) -> Budget:
    content = json.loads(path.read_text(encoding="utf-8"))
    promises = [Promise(**promise) for promise in content["promises"]]
    return Budget(content["architectures"], promises, content["kernels"])


def write(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Replace the measured part; a kernel a line."""
    content = json.loads(path.read_text(encoding="utf-8"))
    lines = lambda items: ",\n".join(f"  {item}" for item in items)  # noqa: E731
    promises = lines(json.dumps(promise) for promise in content["promises"])
    kernels = lines(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in measured.items())
    architectures = json.dumps(content["architectures"])
    text = (
        f'{{\n "architectures": {architectures},\n "promises": [\n{promises}\n ],\n "kernels": {{\n{kernels}\n }}\n}}\n'
    )
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture, as it is launched."""

    kernel: Kernel
    threads: int
    dynamic_shared: int
    occupancy: Occupancy


def rows_of(kernels: list[Kernel], budget: Budget) -> list[Row]:
    """What was measured, for the architectures that have a budget."""
    kernels = [kernel for kernel in kernels if kernel.architecture in budget.architectures]
    launches = []
    for kernel in kernels:
        promise = budget.promise(kernel.name)
        threads = promise.threads if promise and promise.threads else kernel.threads
        dynamic = promise.dynamic_shared if promise else 0
        launches.append(Launch(kernel.architecture, kernel.registers, kernel.shared, dynamic, threads))
    return [
        Row(kernel, launch.threads, launch.dynamic_shared, occupancy)
        for kernel, launch, occupancy in zip(kernels, launches, occupancies(launches), strict=True)
    ]


def measured(rows: list[Row], budget: Budget) -> dict[str, dict[str, Any]]:
    """The measured part of the file; of instances that several objects have, the worst."""
    result: dict[str, dict[str, Any]] = {}
    for name in sorted({row.kernel.name for row in rows}):
        found = [[r for r in rows if (r.kernel.name, r.kernel.architecture) == (name, a)] for a in budget.architectures]
        result[name] = {
            "threads": max(row.threads for group in found for row in group),
            "registers": [max((row.kernel.registers for row in group), default=0) for group in found],
            "shared": [max((row.kernel.shared for row in group), default=0) for group in found],
            "occupancy": [int(min((row.occupancy.percent for row in group), default=0)) for group in found],
        }
    return result


def breaches_of(row: Row, budget: Budget) -> list[str]:
    """What one kernel breaches on one architecture."""
    kernel, promise, found = row.kernel, budget.promise(row.kernel.name), []
    spills = kernel.count("spills")
    if spills:
        found.append(f"{spills} instructions that spill to local memory, where none may")
    if kernel.stack:
        found.append(f"a stack of {kernel.stack} bytes, where there may be none")
    if row.threads > kernel.threads:
        found.append(f"launched with {row.threads} threads, its launch bounds are {kernel.threads}")
    if promise is None:
        found.append("no promise fits it, add one by hand")
    else:
        for name, words in INSTRUCTIONS.items():
            count, least = kernel.count(name), getattr(promise, name)
            if count < least:
                found.append(f"{count} {words}, promised are {least}")
        least = promise.least_occupancy(kernel.architecture)
        if row.occupancy.percent < least:
            limits = " and ".join(row.occupancy.limits) or "shared memory of a block"
            found.append(f"occupancy {row.occupancy.percent:.0f} %, limited by {limits}; promised {least} %")
    entry = budget.kernels.get(kernel.name)
    if entry is None:
        return [*found, "it has no budget"]
    index = budget.architectures.index(kernel.architecture)
    if kernel.registers > entry["registers"][index]:
        found.append(f"{kernel.registers} registers, the budget is {entry['registers'][index]}")
    if kernel.shared > entry["shared"][index]:
        found.append(f"{kernel.shared} bytes of static shared memory, the budget is {entry['shared'][index]}")
    if int(row.occupancy.percent) < entry["occupancy"][index]:
        found.append(f"occupancy {row.occupancy.percent:.0f} %, the budget is {entry['occupancy'][index]} %")
    if row.threads != entry["threads"]:
        found.append(f"blocks of {row.threads} threads, the budget is for {entry['threads']}")
    return found


def breaches(rows: list[Row], budget: Budget) -> list[str]:
    """A sentence for each breach; an empty list when there is none."""
    found = []
    for row in rows:
        place = f"{row.kernel.name}, {row.kernel.architecture}"
        found += [f"{place}: {breach}" for breach in breaches_of(row, budget)]
    names = {row.kernel.name for row in rows}
    for name in dict.fromkeys([*names, *budget.kernels]):
        there = {row.kernel.architecture for row in rows if row.kernel.name == name}
        if not there:
            found.append(f"{name}: has a budget, and is in no object")
        elif missing := [architecture for architecture in budget.architectures if architecture not in there]:
            found.append(f"{name}: is not compiled for {', '.join(missing)} (is TORCH_CUDA_ARCH_LIST set?)")
    used = {id(budget.promise(name)) for name in names}
    found += [f"{p.kernels}: a promise that no kernel falls under" for p in budget.promises if id(p) not in used]
    return list(dict.fromkeys(found))


def table(rows: list[Row], budget: Budget) -> list[str]:
    """A kernel a line; numbers that differ between architectures stand side by side in their order."""
    columns = {
        "threads": lambda row: row.threads,
        "registers": lambda row: row.kernel.registers,
        "shared": lambda row: row.kernel.shared + row.dynamic_shared,
        "stack": lambda row: row.kernel.stack,
        "spills": lambda row: row.kernel.count("spills"),
        "load128": lambda row: row.kernel.count("loads128"),
        "store128": lambda row: row.kernel.count("stores128"),
        "copy128": lambda row: row.kernel.count("copies128"),
        "shared128": lambda row: row.kernel.count("shared128"),
        "tensor": lambda row: row.kernel.count("tensor"),
        "occupancy %": lambda row: round(row.occupancy.percent),
    }
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.kernel.name, {})[row.kernel.architecture] = row
    lines = [["kernel", *columns]]
    for name, group in sorted(groups.items()):
        values = [
            [str(value(group[a])) if a in group else "-" for a in budget.architectures] for value in columns.values()
        ]
        lines.append([name, *(cell[0] if len(set(cell)) == 1 else "/".join(cell) for cell in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
