"""How much of a multiprocessor a kernel fills, by NVIDIA's cuda_occupancy.h: occupancy.cpp, compiled when asked."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .objects import Missing, nvidia_folders

LIMITS = ("warps", "registers", "shared memory", "blocks", "barriers")


class Launch(NamedTuple):
    """What an occupancy depends on; bytes of static and dynamic shared memory, threads of a block."""

    architecture: str
    registers: int
    shared: int
    dynamic_shared: int
    threads: int


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # on a multiprocessor; none when a block asks for more than there is
    percent: float  # of the warps that a multiprocessor can hold
    limits: tuple[str, ...]


def find_header() -> Path:
    folder = next((f / "include" for f in nvidia_folders() if (f / "include" / "cuda_occupancy.h").is_file()), None)
    if folder is None:
        raise Missing("cuda_occupancy.h was not found: it comes with the package nvidia-cuda-runtime")
    return folder


def occupancies(launches: Sequence[Launch]) -> list[Occupancy]:
    """The occupancy of each launch."""
    source, compiler = Path(__file__).with_name("occupancy.cpp"), shlex.split(os.environ.get("CXX", "g++"))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "occupancy")
        try:
            command = [*compiler, "-std=c++17", f"-isystem{find_header()}", source, "-o", program]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError as error:
            raise Missing(f"the compiler {compiler[0]} was not found; CXX names another") from error
        except subprocess.CalledProcessError as error:
            raise Missing(f"{source.name} does not compile: {error.stderr.strip().splitlines()[0]}") from error
        lines = [f"{launch.architecture.removeprefix('sm_')} {' '.join(map(str, launch[1:]))}" for launch in launches]
        run = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    answers = [list(map(int, line.split())) for line in run.stdout.splitlines()]
    if len(answers) != len(launches):
        raise Missing(f"occupancy.cpp has no answer for {launches[len(answers)]}: is its device in the table?")
    return [
        Occupancy(blocks, 100 * warps / most, tuple(name for bit, name in enumerate(LIMITS) if limits >> bit & 1))
        for blocks, warps, most, limits in answers
    ]
