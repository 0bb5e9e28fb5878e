"""`python -m examples.robust RUN`: robust inference of a trained SDNet, see :mod:`examples.robust_inference`."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from examples import require_extras


def parser() -> argparse.ArgumentParser:
    from examples.robust_inference import LEVELS

    made = argparse.ArgumentParser(
        prog="python -m examples.robust",
        description="Robust inference of SDNet: corrupt training pictures of CIFAR-10, fit the best lambda of the "
        "sparse coding layers as a line over their residual, and let that line choose lambda for corrupted test "
        "pictures. Writes OUTPUT/robust.json and robust.png, accuracy against lambda with the adapted points.",
    )
    add = made.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a trained SDNet: runs/experiments/sdnet10/seed0")
    add(
        "--corruptions",
        nargs="+",
        choices=LEVELS,
        default=list(LEVELS),
        metavar="NAME",
        help=f"some of {', '.join(LEVELS)} (all)",
    )
    add("--levels", type=int, default=5, help="levels of each, spread over the paper's; at least 2 (%(default)s)")
    add("--limit", type=int, default=1000, help="pictures for fitting, and as many for testing (%(default)s)")
    add("--attacks", action="store_true", help="also attack by PGD, for which pip install dsc_ops[robust]")
    add("--root", type=Path, help="folder of the data (runs/data)")
    add("--output", type=Path, help="folder of the results (RUN)")
    return made


def main(arguments: list[str] | None = None) -> int:
    require_extras()
    from benchmarks.machine import command
    from examples.robust_inference import run

    commands = parser()
    options = commands.parse_args(arguments)
    for name, least in (("levels", 2), ("limit", 1)):
        if getattr(options, name) < least:
            commands.error(f"--{name} is {getattr(options, name)}, it takes at least {least}")
    if options.attacks and find_spec("torchattacks") is None:
        sys.exit("--attacks needs torchattacks, not installed here: pip install dsc_ops[robust]")
    print("Written: " + ", ".join(map(str, run(options, command("examples.robust", arguments)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
