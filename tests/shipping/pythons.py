"""`make matrix-python`: a wheel with each Python found here, and what it does; see `--help`."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.shipping import building

FOLDER = building.ROOT / "build" / "pythons"
OLDEST = 10
# Every public name has an example in its docstring: running them all is the trial.
TRIAL = "tests/test_docstrings.py"


def requirements() -> list[str]:
    """What building takes, but for nvcc: CUDA kernels are left out here, they do not depend on Python."""
    text = (building.ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"([^"]+)"', text.partition("requires = [")[2].partition("\n]")[0])
    return [requirement for requirement in named if not requirement.startswith("nvidia")]


def version_of(python: str | Path) -> tuple[int, int] | None:
    """(3, 12), or None for what is no Python with a global lock."""
    code = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
    try:
        said = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.split()
    except OSError:
        return None
    return (int(said[0]), int(said[1])) if len(said) == 3 and said[2] == "0" else None


def pythons() -> dict[str, str]:
    """Paths by version, "3.12": from PATH and from pyenv."""
    candidates = [shutil.which(f"python3.{minor}") for minor in range(OLDEST, 100)]
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates += sorted(root.glob("versions/3.*/bin/python3"))
    candidates += [sys.executable]
    found = {}
    for python in filter(None, candidates):
        version = version_of(python)
        if version and version >= (3, OLDEST):
            found.setdefault(version, str(python))
    return {".".join(map(str, version)): found[version] for version in sorted(found)}


def try_python(name: str, python: str, sdist: Path, tree: Path, torch: list[str], keep: bool) -> str:
    """What came of one Python: the wheel's name, or the sentence with which it ended."""
    environment, wheels = FOLDER / f"python-{name}", building.empty(FOLDER / f"wheel-{name}")
    settings = {"env": os.environ | {"DSC_OPS_CUDA": "0"}}
    try:
        made = building.make_environment(environment, python)
        # pip comes with each Python in an age of its own; setuptools is asked for by name, as build isolation does it.
        building.run(
            made, "-m", "pip", "install", *[r for r in requirements() if not r.startswith("torch")], *torch, "pytest"
        )
        wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
        building.run(made, "-m", "pip", *wheel, sdist, **settings)
        built = next(wheels.glob("*.whl"))
        building.run(made, "-m", "pip", "install", "--no-deps", built)
        building.run(made, "-m", "dsc_ops", cwd=tree)
        building.run(made, "-m", "pytest", "-q", TRIAL, cwd=tree)
        return f"ok      Python {name:6}{built.name}"
    except SystemExit as error:
        return f"FAILED  Python {name:6}{error}"
    finally:
        if not keep:
            shutil.rmtree(environment, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 when all is well with every Python."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.shipping.pythons",
        description="With each Python from 3.10 on that is found here (on PATH and in pyenv's folder): build the wheel "
        "from the sdist, without CUDA kernels, install it, and run the examples of all docstrings. An environment with "
        "torch takes up to 7 GB and is removed afterwards. All is made in build/pythons.",
    )
    add = parser.add_argument
    add("--pythons", nargs="+", metavar="VERSION", help="only these, as in 3.10 3.13")
    default = [r for r in requirements() if re.match(r"torch\b", r)]
    add(
        "--torch",
        nargs="+",
        default=default,
        metavar="REQUIREMENT",
        help="to build and run with (default: %(default)s)",
    )
    add("--keep", action="store_true", help="leave the environments there")
    options = parser.parse_args(arguments)
    found = pythons()
    missing = [name for name in options.pythons or [] if name not in found]
    if missing:
        sys.exit(f"Python {', '.join(missing)} was not found here; there are: {', '.join(found)}")
    chosen = {name: path for name, path in found.items() if name in (options.pythons or found)}
    sdist = building.make_sdist(building.empty(FOLDER / "sdist"))
    tree = building.unpack_tests(sdist, FOLDER / "tree")
    rows = [try_python(name, path, sdist, tree, options.torch, options.keep) for name, path in chosen.items()]
    print("\n".join(rows))
    return 0 if all(row.startswith("ok") for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
