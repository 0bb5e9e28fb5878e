"""Where numbers were measured, and files that are there whole or not at all."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from dsc_ops import _library


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what the numbers were measured, and when."""
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
        "date": datetime.date.today().isoformat(),
        "dsc_ops": _library.information(),
    } | ({} if device == "cpu" else {"gpu": gpu(device)})


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
