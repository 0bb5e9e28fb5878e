"""A regression guard: ratios measured now against those committed for this kind of machine.

Both are ratios to the same baselines, those that are measured now, whatever else was committed. A row that lost more
than the tolerance is measured once more after all others, and the better of the two counts: a lasting loss fails twice,
and what slows a shared machine for minutes has passed. Rows that were not committed are not compared; neither are
machines without committed results, which is said and is no failure. A row that cannot be measured is a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.run import Row, Step, identity
from benchmarks.timing import FUSED, ratio

TOLERANCE = 0.15


def comparable(committed: Row, now: Row) -> float:
    """The committed ratio to the fastest of the baselines that were measured now."""
    names = [name for name in now["contenders"] if name in committed["contenders"]]
    if FUSED not in names or len(names) < 2:
        return 0.0  # there is no baseline in common: nothing to lose
    return ratio({name: committed["contenders"][name] for name in names})


def check(committed: dict[str, Any], planned: list[Step], say: Callable[[str], None]) -> list[str]:
    """Measure the planned rows and compare; a sentence for each loss."""
    before = {identity(row): row for row in committed["rows"] if "ratio" in row}
    losses, again, compared = [], [], 0
    for step in planned:
        try:
            row = step.run()
        except RuntimeError as error:
            losses.append(f"{step}: {error}")
            continue
        old = before.get(identity(row))
        if old is None or not (was := comparable(old, row)):
            say(f"{step}: ratio {row['ratio']:.2f}, nothing committed to compare with")
            continue
        compared += 1
        say(f"{step}: ratio {row['ratio']:.2f}, committed {was:.2f}")
        if row["ratio"] < (1 - TOLERANCE) * was:
            again.append((step, was, row["ratio"]))
    for step, was, first in again:
        best = max(first, step.run()["ratio"])
        say(f"{step}, once more: ratio {best:.2f}, committed {was:.2f}")
        if best < (1 - TOLERANCE) * was:
            losses.append(f"{step}: the ratio fell from {was:.2f} to {best:.2f}, by {1 - best / was:.0%}")
    say(f"{compared} ratios compared, {len(losses)} lost more than {TOLERANCE:.0%}.")
    return losses
