"""Peers on one problem: the time to reach the same lasso objective on the same dictionary and photograph.

    fused    dsc_ops.functional.ista(fast=True)
    eager    dsc_ops.reference.ista(fast=True): FISTA in plain PyTorch
    sporco   sporco.admm.cbpdn.ConvBPDN: ADMM in the Fourier domain, with its own choice of penalty, over-relaxation and
             float32, and without its statistics (FastSolve)

The problem is F(x) = 1/2 ||y - S_D x||^2 + lam ||x||_1 for a photograph less its mean and overcomplete cosines of 7x7.
sporco's convolution is circular: an atom that leaves the picture on the right comes in again on the left. So all get
the photograph in a frame of zeros, two kernels wide. Our codes are those of atoms that lie wholly inside (padding 0);
of sporco's codes the ones that wrap around are dropped before F is taken, in the frame, with the same function as for
the others. Atoms that wrap around see nothing but zeros of the frame, where the best code is zero: nothing is lost
(``above_best`` tells how near to the best known F each solver came).

The best known F comes from many iterations of FISTA; the target lies a given part above it. How many iterations a
solver needs is found first; then all solve with that many, from zero and in turns. The step 1/L depends on the
dictionary and the size alone and is taken as known, as for every picture after the first (``step_seconds`` says what it
takes); sporco's constructor with its Fourier transforms, a few per cent of its time, counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import FUSED, fastest, ratio, summary, take_turns, torch_threads
from dsc_ops import functional, reference
from examples.data.photographs import photograph
from examples.networks import dct_atoms

PHOTOGRAPH = "camera.png"
KERNEL = 7
LAM = 0.02  # 1 to 2 % of the code is non-zero
MOST = 2000  # iterations


@dataclass(frozen=True)
class Lasso:
    """A photograph in its frame, (1, 1, H, W), atoms (M, 1, 7, 7), lam, and the step size 1/L."""

    signal: Tensor
    dictionary: Tensor
    lam: float
    step: float
    step_seconds: float

    def objective(self, code: Tensor) -> float:
        value = functional.lasso_objective(code.double(), self.signal.double(), self.dictionary.double(), self.lam)
        return float(value)


def lasso(size: int) -> Lasso:
    """The middle of the photograph, ``size`` pixels a side, in a frame of zeros."""
    picture = photograph(PHOTOGRAPH)
    top, left = ((length - size) // 2 for length in picture.shape[1:])
    middle = picture[:, top : top + size, left : left + size]
    signal = F.pad(middle - middle.mean(), [2 * KERNEL] * 4).unsqueeze(0).contiguous()
    dictionary = dct_atoms(8, KERNEL)
    start = time.perf_counter()
    step = 1 / float(functional.lipschitz(dictionary, signal.shape[2:]))
    return Lasso(signal, dictionary, LAM, step, time.perf_counter() - start)


def fista(ista: Callable[..., Tensor], task: Lasso, iterations: int) -> Tensor:
    """The code after so many iterations of the fused or the eager FISTA."""
    return ista(task.signal, task.dictionary, task.lam, iterations=iterations, step=task.step, fast=True)


def fista_needs(task: Lasso, target: float) -> int | None:
    """The number of iterations to an objective of at most the target; None when MOST miss it."""

    def reaches(iterations: int) -> bool:
        return task.objective(fista(functional.ista, task, iterations)) <= target

    low, enough = 0, 1
    while not reaches(enough):
        if enough >= MOST:
            return None
        low, enough = enough, min(2 * enough, MOST)
    while enough - low > 1:
        middle = (low + enough) // 2
        low, enough = (low, middle) if reaches(middle) else (middle, enough)
    return enough


def sporco_codes(task: Lasso, iterations: int) -> Iterator[Tensor]:
    """sporco's codes, without end, after so many more iterations each, with as many threads as torch has."""
    import sporco.fft
    from sporco.admm.cbpdn import ConvBPDN

    sporco.fft.pyfftw_threads = torch.get_num_threads()
    options = {"MaxMainIter": iterations, "RelStopTol": 0.0, "FastSolve": True, "DataType": np.float32}
    atoms = task.dictionary[:, 0].permute(1, 2, 0).numpy()
    solver = ConvBPDN(atoms, task.signal[0, 0].numpy(), task.lam, ConvBPDN.Options(options), dimK=0)
    inside = [slice(length - KERNEL + 1) for length in task.signal.shape[2:]]
    while True:
        solver.solve()
        code = np.ascontiguousarray(solver.getcoef()[:, :, 0, 0].transpose(2, 0, 1))
        yield torch.from_numpy(code)[(slice(None), *inside)].unsqueeze(0)


def sporco_needs(task: Lasso, target: float) -> int | None:
    """As fista_needs, by going on until it is reached."""
    codes = sporco_codes(task, 1)
    return next((count for count in range(1, MOST + 1) if task.objective(next(codes)) <= target), None)


@torch.no_grad()
def measure(
    *, size: int = 192, above: float = 1e-2, repeats: int = 3, threads: int | None = None, iterations: int = 500
) -> dict[str, Any]:
    """Seconds of each solver to an objective of at most ``1 + above`` times the best known, of ``iterations`` steps."""
    with torch_threads(threads):
        task = lasso(size)
        best_code = fista(functional.ista, task, iterations)
        best = task.objective(best_code)
        count = fista_needs(task, (1 + above) * best)
        if count is None:
            raise RuntimeError(f"FISTA did not come within {above:.1%} of the best objective in {MOST} iterations")
        calls = {
            FUSED: lambda: fista(functional.ista, task, count),
            "eager": lambda: fista(reference.ista, task, count),
        }
        counts, left_out = dict.fromkeys(calls, count), {}
        try:
            counts["sporco"] = sporco_needs(task, (1 + above) * best)
        except ImportError as error:
            left_out["sporco"] = f"it cannot be imported here ({error}): pip install dsc_ops[benchmark]"
        else:
            if counts["sporco"]:
                calls["sporco"] = lambda: next(sporco_codes(task, counts["sporco"]))
            else:
                left_out["sporco"] = f"it did not come within {above:.1%} of the best objective in {MOST} iterations"
        reached = {name: task.objective(run()) / best - 1 for name, run in calls.items()}  # and warmed up
        contenders = {name: summary(times) for name, times in take_turns(calls, repeats).items()}
        used = torch.get_num_threads()
    for name, entry in contenders.items():
        entry |= {"iterations": counts[name], "above_best": reached[name]}
    return {
        "case": f"{PHOTOGRAPH.split('.')[0]} {size}x{size}",
        "above": above,
        "threads": used,
        "density": float(functional.density(best_code)),
        "step_seconds": task.step_seconds,
        "contenders": contenders,
        "left_out": left_out,
        "fastest": fastest(contenders),
        "ratio": ratio(contenders),
    }
