"""The sdist of this checkout, the wheel that a stranger's pip makes of it, and environments to try it in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def make_wheel(sdist: Path, folder: Path, python: str | Path = sys.executable, *options: str, **settings) -> Path:
    """The wheel, from the sdist and not from the checkout: so it is seen that nothing is missing there."""
    run(python, "-m", "pip", "wheel", "--no-deps", *options, "--wheel-dir", folder, sdist, **settings)
    return next(folder.glob("*.whl"))


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """The sdist's files less the package itself, so that only the installed one can be imported."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(sdist, folder)
    tree = next(folder.iterdir())
    shutil.rmtree(tree / "dsc_ops")
    return tree


def make_environment(folder: Path, python: str | Path = sys.executable) -> Path:
    """A new virtual environment; its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"
