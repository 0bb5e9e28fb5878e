"""Files that are there whole or not at all, and the programs that fetch them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("runs/data")  # ignored by git


class Unavailable(Exception):
    """One source does not have the data; its message says why."""


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """A file or a folder, which ``make`` writes if it is not there, under a name from which it is then renamed.

    One process at a time makes something in a folder: others wait, and find it made.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with locked(path.parent):
        if not path.exists():
            try:
                remove(unfinished)  # of a run that was killed
                make(unfinished)
                os.replace(unfinished, path)
            finally:
                remove(unfinished)
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process has this folder locked, and lock it; a process that ends lets go of its locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A folder that is empty at first and removed at the end."""
    remove(path)  # of a run that was killed
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def run(*command: str, folder: Path) -> None:
    """Run a program in ``folder``; :class:`Unavailable` when there is no such program or it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no reason given"]
        raise Unavailable(f"{' '.join(command)} failed ({lines[-1]})") from None


def check_sha256(path: Path, expected: str) -> None:
    """:class:`Unavailable` when the file is not the one that is expected."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise Unavailable(f"{path.name} has the sha256 {found}, not {expected}")
