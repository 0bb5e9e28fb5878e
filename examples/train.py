"""`python -m examples.train fit --config examples/configs/ROW.yaml`: train a row of the papers' tables by Lightning."""

from __future__ import annotations

import sys

from examples import require_extras


def main(arguments: list[str] | None = None) -> int:
    require_extras()
    from examples.cli import CLI

    CLI(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
