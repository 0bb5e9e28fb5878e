"""Peak memory of one training step, measured in a process of its own: `python -m benchmarks.memory FILE CONTENDER`.

The child loads the problem, runs the contender on a corner of it (which loads the libraries), and then counts the
resident memory that one training step adds at its peak to what is there already: inputs, parameters, gradient. Linux
resets the peak through /proc/self/clear_refs; elsewhere the peak since the start of the process is compared, which
counts too little when loading took more than the step. torch.compile is not measured. On a GPU no child is needed:
torch.cuda.max_memory_allocated tells the peak of what tensors took.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Problem, problem
from benchmarks.contenders import call, contender
from benchmarks.timing import FUSED, fastest, ratio

ITERATIONS = (1, 2, 5, 10, 20)


def peak() -> int | None:
    """The most resident memory of this process since the last reset, in bytes; None when the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def peak_since_start() -> int:
    """The same since the start of the process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_above(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that a call adds at its peak to what was resident before."""
    read = peak
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        read = peak_since_start
    if read() is None:
        read = peak_since_start
    before = read()
    run()
    return read() - before


def in_child(task: Problem, name: str, threads: int | None = None) -> int:
    """Bytes of a training step of one contender, by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.pt"
        torch.save((task, threads or torch.get_num_threads()), file)
        return ask("benchmarks.memory", str(file), name)


def ask(module: str, what: str, name: str, *arguments: str) -> int:
    """Bytes that a module prints as a process of its own, for one contender."""
    command = [sys.executable, "-m", module, what, name, *arguments]
    child = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if child.returncode:
        reason = (child.stderr.strip() or f"it ended with status {child.returncode}").splitlines()[-1]
        raise RuntimeError(f"the process that measures the memory of {name} failed: {reason}")
    return json.loads(child.stdout)


def child(file: str, name: str) -> int:
    """What the child does."""
    task, threads = torch.load(file, weights_only=False)  # written by the parent a moment ago
    torch.set_num_threads(threads)
    entry = contender(name, task.case)
    call(entry, task.cut(), "training")()
    return peak_above(call(entry, task, "training"))


def on_gpu(task: Problem, name: str, device: str) -> int:
    """Bytes of a training step of one contender on a GPU."""
    return peak_on_gpu(call(contender(name, task.case), task.to(device), "training"), device)


def peak_on_gpu(step: Callable[[], Any], device: str) -> int:
    """Bytes that a call adds at its peak, as torch's allocator counts them."""
    step()  # libraries ask for their workspaces in the first call
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    case: Case,
    *,
    density: float = 0.1,
    iterations: int = 10,
    threads: int | None = None,
    device: str = "cpu",
    baselines: Sequence[str] = ("eager",),
) -> dict[str, Any]:
    """Peak memory of a training step by contender, in bytes, and their ratio."""
    task = problem(case, density, iterations)
    names = [name for name in (FUSED, *baselines) if name != "compile" and contender(name, case)]
    peaks = {name: in_child(task, name, threads) if device == "cpu" else on_gpu(task, name, device) for name in names}
    contenders = {name: {"median": value, "iqr": 0} for name, value in peaks.items()}
    return {
        "case": case.name,
        "batch": case.batch,
        "iterations": iterations,
        "density_asked": density,
        "density": task.density,
        "mean_density": task.mean_density,
        "code_bytes": task.code.numel() * task.code.itemsize,
        "contenders": contenders,
        "fastest": fastest(contenders),
        "ratio": ratio(contenders),
    }


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
