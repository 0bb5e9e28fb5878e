"""Kernels as they stand in a compiled object: registers, stack, shared memory, threads and instructions.

All of it is read from what cuobjdump and nvdisasm print, of NVIDIA's packages (the extra ``cuda-check``): no GPU,
driver or nvcc takes part.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

MOST_THREADS = 1024  # of a block without launch bounds
RESERVED = 1024  # bytes of CUDA's own, from sm_90 on the first ones of a kernel's section; ptxas -v does not count them

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")

SHARED_SECTION = re.compile(r"\s*\w+\s+\w+\s+(\w+)\s+\w+\s+\w+\s+NOBITS\b.*\s\.nv\.shared\.(?!reserved)(\S+)$")

# What is counted, by the names of machine instructions. HFMA2.MMA and IMAD are ordinary arithmetic.
COUNTED = {
    "spills": r"(LDL|STL)\b",  # local memory: spilled registers, and arrays that found no registers
    "loads128": r"LDG\..*\b(128|256)\b",
    "stores128": r"STG\..*\b(128|256)\b",
    "copies128": r"LDGSTS\..*\b128\b",  # from global to shared memory, cp.async
    "shared128": r"(LDS|STS)\..*\b128\b",
    "tensor": r"([HIDBQO]|[HIQB]G|UTC\w*)MMA\b",
    "atomics": r"(ATOM|ATOMG|ATOMS|RED|REDG)\b",
}


class Missing(Exception):
    """A tool, a header or an object that is not there."""


@dataclass
class Kernel:
    """One kernel for one architecture; bytes of static shared memory are its own, without what CUDA reserves."""

    symbol: str
    architecture: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = MOST_THREADS
    instructions: Counter[str] = field(default_factory=Counter)
    name: str = ""

    def count(self, what: str) -> int:
        """Instructions of a kind that COUNTED names."""
        return sum(number for name, number in self.instructions.items() if re.match(COUNTED[what], name))


def nvidia_folders() -> list[Path]:
    """Where the packages put the toolkit, the newest first, and then CUDA_HOME."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in found.submodule_search_locations or ()] if found else []
    folders = [folder for root in roots for folder in sorted(root.glob("cu*"), reverse=True)]
    return folders + [Path(home) for home in [os.environ.get("CUDA_HOME")] if home]


def find_tool(name: str) -> Path:
    """cuobjdump or nvdisasm."""
    found = [folder / "bin" / name for folder in nvidia_folders()]
    found += [Path(path) for path in [shutil.which(name)] if path]
    tool = next((path for path in found if path.is_file()), None)
    if tool is None:
        raise Missing(f"{name} was not found: make cuda-check installs it, and so does pip install .[cuda-check]")
    return tool


def dump(tool: Path, *arguments: str | Path, folder: Path | None = None) -> list[str]:
    """The lines that a tool prints."""
    run = subprocess.run([tool, *arguments], cwd=folder, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1]
        raise Missing(f"{tool.name} {' '.join(map(str, arguments))} failed: {reason}")
    return run.stdout.splitlines()


def read_resources(kernels: dict[str, Kernel], lines: Iterable[str]) -> None:
    """cuobjdump --dump-resource-usage: registers and stack. Its shared memory counts what CUDA reserves."""
    symbol = ""
    for line in lines:
        if match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernels[symbol].registers, kernels[symbol].stack = int(match[1]), int(match[2])


def read_sections(kernels: dict[str, Kernel], lines: Iterable[str]) -> None:
    """cuobjdump --dump-elf: the size of a kernel's section of shared memory, and its launch bounds."""
    symbol = attribute = ""
    for line in lines:
        if line.startswith("0x"):
            continue  # the contents of sections: most of the lines
        if match := SHARED_SECTION.match(line):
            kernel = kernels[match[2]]
            reserved = RESERVED if int(re.sub(r"\D", "", kernel.architecture)) >= 90 else 0
            kernel.shared = max(0, int(match[1], 16) - reserved)
        elif match := re.match(r"\.nv\.info\.(\S+)$", line):
            symbol = match[1]
        elif line.startswith("."):
            symbol = ""
        elif match := re.match(r"\s*Attribute:\s*(\w+)", line):
            attribute = match[1]
        elif symbol and attribute in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID"):
            if match := re.match(r"\s*Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", line):
                x, y, z = (int(number, 16) for number in match.groups())
                kernels[symbol].threads = x * y * z


def read_instructions(kernels: dict[str, Kernel], lines: Iterable[str]) -> None:
    """nvdisasm --print-code; functions that a kernel calls stand in its section and count as its own."""
    counts: Counter[str] = Counter()
    for line in lines:
        if match := INSTRUCTION.match(line):
            counts[match[1]] += 1
        elif match := re.match(r"\.text\.(\S+):$", line):
            counts = kernels[match[1]].instructions


class Kernels(dict[str, Kernel]):
    """The kernels of one architecture by symbol; a new one where none was."""

    def __init__(self, architecture: str):
        super().__init__()
        self.architecture = architecture

    def __missing__(self, symbol: str) -> Kernel:
        return self.setdefault(symbol, Kernel(symbol, self.architecture))


def read_cubin(file: Path) -> list[Kernel]:
    """The kernels of one source file for one architecture, which cuobjdump names: x.1.sm_80.cubin."""
    cuobjdump, kernels = find_tool("cuobjdump"), Kernels(file.suffixes[-2].removeprefix("."))
    read_resources(kernels, dump(cuobjdump, "--dump-resource-usage", file))
    read_sections(kernels, dump(cuobjdump, "--dump-elf", file))
    read_instructions(kernels, dump(find_tool("nvdisasm"), "--print-code", file))
    return list(kernels.values())


def short_name(demangled: str) -> str:
    """A kernel's name with its template arguments; without namespaces, parameters, result and casts.

    >>> short_name("void dsc::cuda::sum_kernel<float, dsc::Rule<(dsc::Kind)2> >(float const*, long)")
    'sum_kernel<float, Rule<2>>'
    """
    depth = 0
    for index, letter in enumerate(demangled):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and not demangled.startswith("(anonymous namespace)", index):
            demangled = demangled[:index]
            break
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\([\w:]+\)(?=-?\d)", "", name)
    return re.sub(r"\b\w+::", "", name).replace("> >", ">>").replace("> >", ">>").strip()


def short_names(symbols: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        raise Missing("c++filt was not found: it comes with the compiler's binutils")
    run = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [short_name(line) for line in run.stdout.splitlines()]


def read_kernels(file: Path) -> list[Kernel]:
    """All kernels of an object or a library, by name and architecture; some stand in it more than once."""
    if not file.is_file():
        raise Missing(f"{file} is not there")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        dump(find_tool("cuobjdump"), "--extract-elf", "all", file.absolute(), folder=Path(folder))
        found = [kernel for kernels in pool.map(read_cubin, sorted(Path(folder).iterdir())) for kernel in kernels]
    for kernel, name in zip(found, short_names([kernel.symbol for kernel in found]), strict=True):
        kernel.name = name
    return sorted(found, key=lambda kernel: (kernel.name, len(kernel.architecture), kernel.architecture))
