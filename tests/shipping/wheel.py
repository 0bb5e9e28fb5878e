"""`make wheel`: dist/ with the sdist and the wheel made of it, with the manylinux tag that its objects earn."""

from __future__ import annotations

import argparse

from tests.shipping import building


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.shipping.wheel",
        description="Empty dist/ and make the sdist and the wheel there: the sdist has the same bytes wherever it is "
        "made, the wheel is built from it with build isolation. auditwheel gives it the manylinux tag of the oldest "
        "machines on which its objects run, and adds no library to it. Older machines: build on one of them.",
    )
    parser.add_argument(
        "--here", action="store_true", help="pack this checkout with the torch installed here; what was compiled stays"
    )
    here = parser.parse_args(arguments).here
    folder = building.empty(building.ROOT / "dist")
    sdist = building.make_sdist(folder)
    print(f"The wheel: {building.make_wheel(building.ROOT if here else sdist, folder, isolated=not here)}")


if __name__ == "__main__":
    main()
