"""The support table of README.md. Each row is a mark on a test, `@pytest.mark.supports(area, promise)`, and names the
tests that bear it: no test, no row.

    python -m tests.support_table    writes the table into README.md; a test fails where it is not up to date
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"
BEGIN = "<!-- support table: written by `python -m tests.support_table` from the tests' marks -->"
END = "<!-- end of the support table -->"
AREAS = (
    "compile and transform",
    "precision",
    "state",
    "distributed",
    "memory",
    "numbers",
    "threads",
    "faults",
    "fuzzing",
)


def marks(path: Path) -> Iterator[tuple[str, str, str]]:
    """(area, promise, test) of each mark in a file, in its order."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.supports":
                area, promise = (ast.literal_eval(argument) for argument in mark.args)
                if area not in AREAS or not node.name.startswith("test_"):
                    raise ValueError(f"{path.name}: {node.name} supports {area!r}; areas are {', '.join(AREAS)}")
                yield area, promise, f"{path.stem}::{node.name}"


def rows() -> dict[tuple[str, str], list[str]]:
    """The tests that bear each (area, promise)."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(TESTS.glob("support/test_*.py")) + sorted(TESTS.glob("test_*.py")):
        for area, promise, test in marks(path):
            found.setdefault((area, promise), []).append(test)
    return found


def table() -> str:
    lines = ["| | promise | shown by, in `tests/` |", "| --- | --- | --- |"]
    found = rows()
    for area in AREAS:
        first = True
        for (of, promise), tests in found.items():
            if of == area:
                shown = ", ".join(f"`{test}`" for test in tests)
                lines.append(f"| {f'**{area}**' if first else ''} | {promise} | {shown} |")
                first = False
    return "\n".join(lines)


def written(text: str) -> str:
    """README.md with the table of the tests as they are."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the support table: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
