"""`make matrix`: one wheel, the test suite with it under each torch. `--help` tells the rest."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.shipping import building

FOLDER = building.ROOT / "build" / "matrix"
WHERE = "import sys, torch, dsc_ops; print(sys.version.split()[0], torch.__version__, dsc_ops.__file__)"
# They test the sources, from which they make objects of their own, and not the wheel.
OF_SOURCES = ("tests/test_sanitizers.py", "tests/test_cuda_*.py")


@dataclass
class Row:
    """What is told of one torch."""

    torch: str
    ok: bool
    said: str
    minutes: float


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.shipping.matrix",
        description="Build one wheel, with build isolation and from the sdist, and run the tests of the sdist with it "
        "in a new environment for each torch, less those that test the sources themselves. The exit status is 1 when "
        "any of them fails; a table tells which. An environment takes up to 7 GB, and is removed when its tests "
        "have passed or failed. All is made in build/matrix.",
        epilog="What is not named here goes to pytest, as in: python -m tests.shipping.matrix --torch 2.13.0 -x",
    )
    made.add_argument(
        "--torch", nargs="+", default=["2.10.0", "2.13.0", "2.14.1"], metavar="VERSION", help="%(default)s"
    )
    made.add_argument("--wheel", type=Path, help="test this wheel in place of a new one")
    made.add_argument("--keep", action="store_true", help="leave the environments there, to look at what failed")
    return made


def said(report: Path) -> str:
    """The counts of a JUnit report."""
    if not report.exists():
        return "no tests ran"
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return f"{count['tests'] - failed - count['skipped']} passed, {count['skipped']} skipped, {failed} failed"


def try_torch(version: str, wheel: Path, tree: Path, arguments: list[str], keep: bool) -> Row:
    """The suite under one torch."""
    start, environment = time.monotonic(), FOLDER / f"torch-{version}"
    report = FOLDER / f"torch-{version}.xml"
    report.unlink(missing_ok=True)
    found = version
    try:
        python = building.make_environment(environment)
        building.run(python, "-m", "pip", "install", f"torch=={version}", f"{wheel}[test]")
        building.run(python, "-c", WHERE, cwd=tree)
        found = subprocess.check_output([python, "-c", "import torch; print(torch.__version__)"], text=True).strip()
        if found.partition("+")[0] != version.partition("+")[0]:
            raise SystemExit(f"torch {version} was asked for, and {found} installed")
        building.run(python, "-m", "dsc_ops", cwd=tree)
        ignored = [f"--ignore-glob={name}" for name in OF_SOURCES]
        building.run(python, "-m", "pytest", *ignored, f"--junitxml={report}", *arguments, cwd=tree)
        ok, words = True, said(report)
    except SystemExit as error:
        print(error, file=sys.stderr)
        ok, words = False, said(report) if report.exists() else str(error)
    finally:
        if not keep:
            shutil.rmtree(environment, ignore_errors=True)
    return Row(found, ok, words, (time.monotonic() - start) / 60)


def table(rows: list[Row], wheel: str) -> str:
    lines = [f"{'ok' if row.ok else 'FAILED':8}torch {row.torch:16}{row.said:40}{row.minutes:6.1f} min" for row in rows]
    return "\n".join([wheel, *lines])


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 when the suite passed under every torch."""
    options, rest = parser().parse_known_args(arguments)
    if options.wheel and not options.wheel.exists():
        sys.exit(f"--wheel is {options.wheel}: there is no such file")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sdist = building.make_sdist(building.empty(FOLDER / "sdist"))
    wheel = options.wheel.resolve() if options.wheel else building.make_wheel(sdist, building.empty(FOLDER / "wheel"))
    tree = building.unpack_tests(sdist, FOLDER / "tree")
    rows = [try_torch(version, wheel, tree, rest, options.keep) for version in options.torch]
    print(table(rows, wheel.name))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
