"""Where numbers were measured, and files that are there whole or not at all."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsc_ops import _library


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what the numbers were measured, and when."""
    cpuinfo = Path("/proc/cpuinfo")
    named = processor(cpuinfo.read_text()) if cpuinfo.exists() else ""
    return {
        "processor": named or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "dsc_ops": _library.information(),
    } | ({} if device == "cpu" else {"gpu": gpu(device)})


def processor(cpuinfo: str) -> str:
    """The model name; where that has no number, as in many virtual machines, with the family and model, which tell.

    >>> processor("cpu family\\t: 25\\nmodel\\t\\t: 17\\nmodel name\\t: AMD EPYC")
    'AMD EPYC, family 25, model 17'
    """
    facts = dict(reversed(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*?)\s*$", cpuinfo, re.MULTILINE)))
    name = facts.get("model name", "")
    if re.search(r"\d", name) or not {"cpu family", "model"} <= facts.keys():
        return name
    return f"{name}, family {facts['cpu family']}, model {facts['model']}"


def commit() -> str:
    """The commit of the checkout, with + where files differ from it; empty where there is no git."""
    described = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def command(program: str, arguments: Sequence[str] | None) -> str:
    """How a program was called; arguments are those of its main function, None for those of the process."""
    return " ".join([f"python -m {program}", *(sys.argv[1:] if arguments is None else arguments)])


def gpu(device: str) -> dict[str, Any]:
    """What a GPU is and what drives it; torch lets convolutions use TensorFloat-32 unless it is told otherwise."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "allow_tf32": False,  # by benchmarks.timing.full_float32
    }


def machine_name(facts: dict[str, Any]) -> str:
    """A file name for a kind of machine: processor, instruction set of the kernels, number of cores; no host name.

    Of a machine whose GPU was measured, the GPU alone.

    >>> machine_name({"processor": "AMD EPYC (R) 7B13", "cores": 2, "dsc_ops": {"cpu_capability": "avx2"}})
    'amd-epyc-7b13-avx2-2-cores'
    >>> machine_name({"gpu": {"name": "NVIDIA H100 80GB HBM3"}})
    'nvidia-h100-80gb-hbm3'
    """
    if "gpu" in facts:
        return re.sub(r"[^a-z0-9]+", "-", facts["gpu"]["name"].lower()).strip("-")
    plain = re.sub(r"\((r|tm|c)\)|@.*|\bcpu\b|\bprocessor\b", " ", facts["processor"].lower())
    level = facts["dsc_ops"]["cpu_capability"].removesuffix("_bf16")  # which differs for bfloat16 alone
    parts = [plain, level, str(facts["cores"]), "core" if facts["cores"] == 1 else "cores"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts)).strip("-")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(unfinished, path)
