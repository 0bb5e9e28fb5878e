"""The command line of the static check."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import budget
from .objects import COUNTED, Missing, read_kernels

ROOT = Path(__file__).parents[2]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make cuda-check",
        description=(
            "Hold compiled CUDA kernels against their budget, tests/cuda_static/budget.json: registers, shared\n"
            "memory, no spills and no stack, the 128-bit and matrix instructions that were promised, occupancy. No\n"
            "GPU, driver or nvcc is needed. Exit status: 0 when all keep to it, 1 on a breach, 2 when something is\n"
            "missing. In tests/ the same is python -m cuda_static with these arguments, which make takes as ARGS.\n"
        ),
        epilog=budget.__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help="objects or libraries (default: dsc_ops/_cuda*.so)")
    parser.add_argument("--update", action="store_true", help="write what was measured into the budget")
    parser.add_argument("--budget", type=Path, default=budget.FILE, metavar="FILE", help="another budget")
    parser.add_argument(
        "--instructions", metavar="WORD", help="list the instructions of kernels with this in their name"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        files = options.files or sorted((ROOT / "dsc_ops").glob("_cuda*.so"))
        if not files:
            raise Missing("there is nothing to check: dsc_ops was built without CUDA kernels")
        kernels = [kernel for file in files for kernel in read_kernels(file)]
        if options.instructions:
            list_instructions([kernel for kernel in kernels if options.instructions in kernel.name])
            return 0
        limits = budget.read(options.budget)
        rows = budget.rows_of(kernels, limits)
    except Missing as reason:
        print(f"cuda-check: {reason}", file=sys.stderr)
        return 2
    print("\n".join(budget.table(rows, limits)))
    print(f"Where numbers differ they are those of {'/'.join(limits.architectures)}.")
    if options.update:
        budget.write(options.budget, budget.measured(rows, limits))
        limits = budget.read(options.budget)
        print(f"Written: {options.budget}")
    found = budget.breaches(rows, limits)
    for breach in found:
        print(f"BREACH  {breach}")
    print(f"{len(rows)} kernels for {len(limits.architectures)} architectures, {len(found)} breaches of the budget.")
    return 1 if found else 0


def list_instructions(kernels) -> None:
    """For those who look for the cause: how many of each instruction, the most frequent first."""
    for kernel in kernels:
        counts = ", ".join(f"{number} {name}" for name, number in kernel.instructions.most_common())
        kinds = ", ".join(f"{what} {kernel.count(what)}" for what in COUNTED)
        print(f"{kernel.name}, {kernel.architecture}: {kinds}; {counts}")


if __name__ == "__main__":
    sys.exit(main())
