"""The record of a run of tests/test_gpu.py on a GPU, tests/results/GPU.json, to be committed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
COUNTED = ("passed", "failed", "error", "skipped", "xfailed")
PART = "No results were written: only a part of the tests ran."
NO_GPU = 3  # the exit status where a GPU was asked for and none can be used


def obstacle(gpu: bool, cuda_reason: str) -> str:
    """What stands against tests on a GPU; empty when nothing does."""
    if not gpu:
        return "torch finds no GPU (torch.cuda.is_available() is False)"
    return cuda_reason


def is_whole(stats: Mapping[str, Sequence[Any]], collected: int) -> bool:
    """Whether all tests ran: none was left out by -k, and none after a failure or an interruption."""
    return not stats.get("deselected") and 0 < collected <= sum(len(stats.get(name, ())) for name in COUNTED)


def record(stats: Mapping[str, Sequence[Any]], exitstatus: int, facts: dict[str, Any]) -> dict[str, Any]:
    """What ran where, and how it ended; names of what failed, and reasons of what was skipped."""
    return {
        "exit_status": exitstatus,
        "counts": {name: len(stats.get(name, ())) for name in COUNTED},
        "failed": sorted(report.nodeid for name in ("failed", "error") for report in stats.get(name, ())),
        "skipped": sorted({f"{skip.nodeid}: {reason_of(skip)}" for skip in stats.get("skipped", ())}),
        "machine": facts,
    }


def reason_of(report) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def write(stats: Mapping[str, Sequence[Any]], exitstatus: int, folder: Path | None = None, facts=None) -> str:
    """Write the record, and say where."""
    from benchmarks.machine import machine, machine_name, write_whole  # late: where only tests are, conftest needs none

    facts = facts or machine("cuda")
    path = (folder or FOLDER) / f"{machine_name(facts)}.json"
    write_whole(path, json.dumps(record(stats, exitstatus, facts), indent=1) + "\n")
    return f"Written: {path}"
