"""Peers on one problem: the time to reach the same lasso objective on the same dictionary and photograph.

    fused    dsc_ops.functional.ista(fast=True)
    eager    dsc_ops.reference.ista(fast=True): FISTA in plain PyTorch
    sporco   sporco.admm.cbpdn.ConvBPDN: ADMM in the Fourier domain, with its own choice of penalty, over-relaxation and
             float32, and without its statistics (FastSolve)

The problem is F(x) = 1/2 ||y - S_D x||^2 + lam ||x||_1 for a photograph less its mean and overcomplete cosines of 7 x 7.
sporco's convolution is circular: an atom that leaves the picture on the right comes in again on the left. So all get the
photograph in a frame of zeros, two kernels wide. Our codes are those of atoms that lie wholly inside (padding 0); of
sporco's codes the ones that wrap around are dropped before F is taken, in the frame, with the same function as for the
others. Atoms that wrap around see nothing but zeros of the frame, where the best code is zero: nothing is lost (the
table tells how near to the best known F sporco comes).

Each solver starts from zero and includes its preparation, the step size or the Fourier transform of the dictionary. The
best known F comes from many iterations of FISTA; the target lies a given part above it. The iterations that a solver
needs are found by doubling and halving; then all solve with that many, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import FUSED, fastest, ratio, summary, take_turns, torch_threads
from dsc_ops import functional, reference
from examples.data import photograph
from examples.networks import dct_atoms

PHOTOGRAPH = "camera.png"
KERNEL = 7
LAM = 0.05  # 2 % of the code is non-zero
MOST = 2048  # iterations


@dataclass(frozen=True)
class Lasso:
    """A photograph in its frame, (1, 1, H, W), atoms (M, 1, 7, 7), and lam."""

    signal: Tensor
    dictionary: Tensor
    lam: float

    def objective(self, code: Tensor) -> float:
        value = functional.lasso_objective(code.double(), self.signal.double(), self.dictionary.double(), self.lam)
        return float(value)


Solver = Callable[[Lasso, int], Tensor]  # the code after so many iterations


def lasso(size: int) -> Lasso:
    """The middle of the photograph, ``size`` pixels a side, in a frame of zeros."""
    picture = photograph(PHOTOGRAPH)
    top, left = ((length - size) // 2 for length in picture.shape[1:])
    middle = picture[:, top : top + size, left : left + size]
    signal = torch.nn.functional.pad(middle - middle.mean(), [2 * KERNEL] * 4)
    return Lasso(signal.unsqueeze(0).contiguous(), dct_atoms(8, KERNEL), LAM)


def fused(task: Lasso, iterations: int) -> Tensor:
    return functional.ista(task.signal, task.dictionary, task.lam, iterations=iterations, fast=True)


def eager(task: Lasso, iterations: int) -> Tensor:
    return reference.ista(task.signal, task.dictionary, task.lam, iterations=iterations, fast=True)


def sporco_solver() -> Solver:
    """sporco's ConvBPDN with as many threads as torch has. ImportError where sporco is not installed."""
    import sporco.fft
    from sporco.admm.cbpdn import ConvBPDN

    def solve(task: Lasso, iterations: int) -> Tensor:
        sporco.fft.pyfftw_threads = torch.get_num_threads()
        options = ConvBPDN.Options(
            {"MaxMainIter": iterations, "RelStopTol": 0.0, "FastSolve": True, "DataType": np.float32}
        )
        atoms = task.dictionary[:, 0].permute(1, 2, 0).numpy()
        solver = ConvBPDN(atoms, task.signal[0, 0].numpy(), task.lam, options, dimK=0)
        solver.solve()
        code = torch.from_numpy(np.ascontiguousarray(solver.getcoef()[:, :, 0, 0].transpose(2, 0, 1)))
        inside = [slice(length - KERNEL + 1) for length in task.signal.shape[2:]]
        return code[(slice(None), *inside)].unsqueeze(0)

    return solve


def needed(solve: Solver, task: Lasso, target: float) -> int | None:
    """The least number of iterations with an objective of at most the target; None when MOST are not enough."""

    def reaches(iterations: int) -> bool:
        return task.objective(solve(task, iterations)) <= target

    enough = 1
    while not reaches(enough):
        if enough >= MOST:
            return None
        enough *= 2
    low = enough // 2  # does not reach it
    while enough - low > 1:
        middle = (low + enough) // 2
        low, enough = (low, middle) if reaches(middle) else (middle, enough)
    return enough


@torch.no_grad()
def measure(
    *, size: int = 256, above: float = 1e-2, repeats: int = 3, threads: int | None = None, iterations: int = 500
) -> dict[str, Any]:
    """Seconds of each solver to an objective of at most ``1 + above`` times the best known, of ``iterations`` steps."""
    solvers: dict[str, Solver] = {FUSED: fused, "eager": eager}
    left_out = {}
    try:
        solvers["sporco"] = sporco_solver()
    except ImportError as error:
        left_out["sporco"] = f"it cannot be imported here ({error}): pip install dsc_ops[benchmark]"
    with torch_threads(threads):
        task = lasso(size)
        best_code = fused(task, iterations)
        best = task.objective(best_code)
        counts = {name: needed(solve, task, (1 + above) * best) for name, solve in solvers.items()}
        for name in [name for name, count in counts.items() if count is None]:
            left_out[name] = f"it did not come within {above:.1%} of the best objective in {MOST} iterations"
        calls = {name: lambda n=name, c=count: solvers[n](task, c) for name, count in counts.items() if count}
        reached = {name: task.objective(run()) / best - 1 for name, run in calls.items()}  # and warmed up
        contenders = {name: summary(times) for name, times in take_turns(calls, repeats).items()}
        used = torch.get_num_threads()
    for name, entry in contenders.items():
        entry |= {"iterations": counts[name], "above_best": reached[name]}
    return {
        "case": f"{PHOTOGRAPH.split('.')[0]} {size}x{size}",
        "above": above,
        "threads": used,
        "best": best,
        "density": float(functional.density(best_code)),
        "contenders": contenders,
        "left_out": left_out,
        "fastest": fastest(contenders),
        "ratio": ratio(contenders),
    }
