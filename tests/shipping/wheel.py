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
        "--no-build-isolation", action="store_true", help="build with the torch that is installed here, in less time"
    )
    isolated = not parser.parse_args(arguments).no_build_isolation
    folder = building.empty(building.ROOT / "dist")
    print(f"The wheel: {building.make_wheel(building.make_sdist(folder), folder, isolated=isolated)}")


if __name__ == "__main__":
    main()
