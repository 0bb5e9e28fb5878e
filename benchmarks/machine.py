"""Where numbers were measured, and files that are there whole or not at all."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from dsc_ops import _library


def machine() -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "dsc_ops": _library.information(),
    }


def machine_name(facts: dict[str, Any]) -> str:
    """A file name for a kind of machine: processor, instruction set of the kernels, number of cores; no host name.

    >>> machine_name({"processor": "AMD EPYC (R) 7B13", "cores": 2, "dsc_ops": {"cpu_capability": "avx2"}})
    'amd-epyc-7b13-avx2-2-cores'
    """
    plain = re.sub(r"\((r|tm|c)\)|@.*|\bcpu\b|\bprocessor\b", " ", facts["processor"].lower())
    parts = [plain, facts["dsc_ops"]["cpu_capability"], str(facts["cores"]), "core" if facts["cores"] == 1 else "cores"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts)).strip("-")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(unfinished, path)
