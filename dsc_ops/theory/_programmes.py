"""Linear programmes by HiGHS, which scipy brings: many of one kind, in parallel, with a bar when they take long."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

BAR_AFTER = 2.0  # seconds
# HiGHS takes nothing below 1e-10: how far a constraint may be missed.
TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
INFEASIBLE = 2  # scipy's status


def linprog() -> Callable[..., Any]:
    """scipy's solver, or one sentence about what to install."""
    try:
        return import_module("scipy.optimize").linprog
    except ImportError as error:
        raise ImportError(
            "dsc_ops.theory solves linear programmes with scipy, not installed here: pip install dsc_ops[theory]"
        ) from error


def solve(**programme: Any) -> Any:
    """The optimum, or None when no point satisfies the constraints."""
    found = linprog()(method="highs", options=TOLERANCES, **programme)
    if found.status == INFEASIBLE:
        return None
    if found.status != 0:
        raise RuntimeError(f"dsc_ops.theory: HiGHS found no optimum of a linear programme: {found.message}")
    return found


def solve_each(task: Callable[[int], Any], count: int, description: str) -> list[Any]:
    """``task`` of 0 .. count - 1. HiGHS runs outside of Python's lock, so threads are enough."""
    linprog()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max(1, min(count, cores))) as pool:
        futures = [pool.submit(task, index) for index in range(count)]
        try:
            return [future.result() for future in bar(futures, description)]
        finally:
            for future in futures:  # after an error or Ctrl-C the rest is not begun
                future.cancel()


def bar(futures: list[Any], description: str) -> Iterable[Any]:
    """A progress bar around the futures when tqdm is there and the programmes take long."""
    with contextlib.suppress(ImportError):
        return import_module("tqdm").tqdm(futures, description, delay=BAR_AFTER, leave=False)
    return futures


def least_l1(matrix: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """min ||c||_1 with matrix c = target, and the dual optimum max target^T w with |matrix^T w| <= 1.

    c = p - n with p, n >= 0 makes it a linear programme in standard form. None when the target is not in the span.
    """
    columns = matrix.shape[1]
    if columns == 0:
        return None
    found = solve(c=np.ones(2 * columns), A_eq=np.hstack([matrix, -matrix]), b_eq=target, bounds=(0, None))
    if found is None:
        return None
    return found.x[:columns] - found.x[columns:], np.asarray(found.eqlin.marginals)


def least_entries(others: np.ndarray, atom: np.ndarray, coherence: float) -> np.ndarray | None:
    """The w with w^T atom = 1 and |others^T w| <= coherence whose largest entry is least."""
    rows, count = others.shape
    identity, one = np.eye(rows), np.ones((rows, 1))
    products, zero = others.T, np.zeros((count, 1))
    found = solve(
        c=np.r_[np.zeros(rows), 1.0],
        A_ub=np.block([[identity, -one], [-identity, -one], [products, zero], [-products, zero]]),
        b_ub=np.r_[np.zeros(2 * rows), np.full(2 * count, coherence)],
        A_eq=np.r_[atom, 0.0][None],
        b_eq=[1.0],
        bounds=[(None, None)] * rows + [(0, None)],
    )
    return None if found is None else found.x[:rows]
