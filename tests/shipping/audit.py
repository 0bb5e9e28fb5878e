"""`make audit`: what a wheel contains and what its objects ask for. `--help` tells the rest."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The objects of the package, and nothing else that a linker made.
OBJECTS = re.compile(r"dsc_ops/_(C|cuda)\.[\w.-]+\.so")
# Libraries that an object may ask for: of every Linux machine, of the user's torch, and for _cuda of its CUDA packages.
SYSTEM = re.compile(r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux[\w-]*\.so\.\d+")
TORCH = {"_C": {"libtorch_cpu.so"}, "_cuda": {"libtorch_cpu.so", "libtorch_cuda.so"}}
CUDA = re.compile(r"libcudart\.so\.\d+")
# Where a symbol may come from: the C functions of torch's stable ABI, Python, the runtime libraries (whose symbols have
# versions), and what every shared object mentions.
STABLE = re.compile(r"(aoti_)?torch_[a-z0-9_]+")
PYTHON = re.compile(r"_?Py[A-Z_]\w*")
VERSIONED = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|@libcudart\.so\.\d+$")
EVERYWHERE = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}
CUDART = re.compile(r"(__)?cuda[A-Z]\w+")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(shared: Path) -> list[str]:
    """The libraries that the loader will look for."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-dW", shared))


def undefined(shared: Path) -> list[str]:
    """Symbols that other libraries have to bring, with their versions: `memcpy@GLIBC_2.14`."""
    lines = output("nm", "-D", "--undefined-only", shared).splitlines()
    return [line.split()[-1].replace("@@", "@") for line in lines]


def newest_glibc(shared: Path) -> tuple[int, ...]:
    """The oldest glibc that has all symbols asked for."""
    versions = re.findall(r"@GLIBC_([\d.]+)$", "\n".join(undefined(shared)), re.MULTILINE)
    return max(tuple(map(int, version.split("."))) for version in versions)


def stable_symbols(shared: Path) -> set[str]:
    """What the object calls of torch."""
    return {name for name in undefined(shared) if STABLE.fullmatch(name)}


def object_problems(shared: Path) -> list[str]:
    """What is wrong with the libraries and symbols of one object."""
    name = "_cuda" if shared.name.startswith("_cuda") else "_C"
    found = []
    for library in needed(shared):
        allowed = SYSTEM.fullmatch(library) or library in TORCH[name] or (name == "_cuda" and CUDA.fullmatch(library))
        found += [] if allowed else [f"{shared.name} needs {library}"]
    if re.search(r"\((RPATH|RUNPATH)\)", output("readelf", "-dW", shared)):
        found.append(f"{shared.name} has a path of the machine that linked it")
    for symbol in undefined(shared):
        allowed = STABLE.fullmatch(symbol) or PYTHON.fullmatch(symbol) or VERSIONED.search(symbol)
        allowed = allowed or symbol in EVERYWHERE or (name == "_cuda" and CUDART.fullmatch(symbol))
        found += [] if allowed else [f"{shared.name} takes {symbol}, which is not of torch's stable ABI"]
    return found


def content_problems(names: list[str]) -> list[str]:
    """What does not belong into the wheel."""
    package = re.compile(r"dsc_ops/([\w/]+\.py|py\.typed)|dsc_ops-[\w.]+\.dist-info/[\w./-]+")
    return [
        f"{name} does not belong into the wheel"
        for name in names
        if not package.fullmatch(name) and not OBJECTS.fullmatch(name)
    ]


def tag_problems(wheel: Path, objects: list[Path]) -> list[str]:
    """Whether the platform tag promises no older machine than the objects run on."""
    match = re.search(r"-manylinux_(\d+)_(\d+)_\w+\.whl$", wheel.name)
    if not match:
        return [f"{wheel.name} has no manylinux tag (make wheel gives it one)"]
    promised = tuple(map(int, match.groups()))
    return [
        f"{shared.name} needs glibc {'.'.join(map(str, newest_glibc(shared)))}, the tag promises {match[1]}.{match[2]}"
        for shared in objects
        if newest_glibc(shared) > promised
    ]


def audit(wheel: Path) -> list[str]:
    """Everything that is wrong with a wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        archive.extractall(folder)
        objects = [Path(folder, name) for name in names if OBJECTS.fullmatch(name)]
        problems = content_problems(names) + tag_problems(wheel, objects)
        if not any(shared.name.startswith("_C.") for shared in objects):
            problems.append(f"{wheel.name} has no compiled dsc_ops/_C")
        for shared in objects:
            problems += object_problems(shared)
            glibc = ".".join(map(str, newest_glibc(shared)))
            print(f"{shared.name}: {shared.stat().st_size / 1e6:.1f} MB, needs {', '.join(needed(shared))}")
            print(f"  {len(stable_symbols(shared))} functions of torch's stable ABI, glibc {glibc} or newer")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.shipping.audit",
        description="Look into a wheel: that it contains the package and its two objects only (no library of torch or "
        "CUDA), that its manylinux tag promises no older machine than the objects run on, and that these take nothing "
        "from torch but the C functions of the stable ABI. Needs readelf and nm.",
    )
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args(arguments).wheel
    if not wheel.exists():
        sys.exit(f"wheel is {wheel}: there is no such file")
    problems = audit(wheel)
    print("\n".join(f"WRONG  {problem}" for problem in problems) or f"nothing is wrong with {wheel.name}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
