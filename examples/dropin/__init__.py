"""The layers and the penalty in models of other people: short scripts to copy from.

docs/examples.md lists them. They make their own pictures, download nothing, and take a minute or two each (`--fast`:
seconds). This is no part of the installed package; it runs from a checkout, with the packages of
`pip install dsc_ops[dropin]`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor, nn


def parser(name: str, description: str, gamma: float | None = None) -> argparse.ArgumentParser:
    """The options that all scripts share."""
    made = argparse.ArgumentParser(prog=f"python -m examples.dropin.{name}", description=description)
    made.add_argument("--steps", type=int, default=60, help="training steps (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of weights and pictures (%(default)s)")
    if gamma is not None:
        made.add_argument("--gamma", type=float, default=gamma, help="weight of the penalty (%(default)s)")
    made.add_argument("--fast", action="store_true", help="few steps, to see that it runs: the numbers mean nothing")
    return made


def require(*names: str) -> None:
    """End the program with one clear sentence when packages are missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        sys.exit(f"This example needs {', '.join(missing)}, not installed here: pip install dsc_ops[dropin]")


def stripes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy colour pictures (N, 3, size, size) of stripes, and which of four directions they have, (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    angle, phase = labels * torch.pi / 4, 2 * torch.pi * torch.rand(count, 3, 1, 1, generator=generator)
    place = torch.arange(size, dtype=torch.float32)
    across = angle.cos().view(-1, 1, 1) * place + angle.sin().view(-1, 1, 1) * place.view(-1, 1)
    pictures = torch.sin(across.unsqueeze(1) * 0.8 + phase)
    return pictures + 0.5 * torch.randn(count, 3, size, size, generator=generator), labels


def discs(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy colour pictures (N, 3, size, size) of one bright disc, and its mask (N, 1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    centre = size * (0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=generator))
    radius = size * (0.1 + 0.15 * torch.rand(count, 1, 1, generator=generator))
    place = torch.arange(size, dtype=torch.float32)
    distance = ((place.view(-1, 1) - centre[:, 0]).square() + (place - centre[:, 1]).square()).sqrt()
    masks = (distance < radius).float().unsqueeze(1)
    return masks + 0.5 * torch.randn(count, 3, size, size, generator=generator), masks


def train(
    step: Callable[[Tensor, Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    data: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
) -> list[float]:
    """Plain training with Adam: ``data`` of each step's number goes through ``step``, which returns the loss."""
    optimizer, losses = torch.optim.Adam(parameters, lr=2e-3), []
    for number in range(steps):
        loss = step(*data(number))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if sys.stderr.isatty():
            print(f"\rstep {number + 1}/{steps}, loss {losses[-1]:.3f}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return losses


def milliseconds(*calls: Callable[[], object], repeats: int = 5) -> list[float]:
    """The median time of each call, taken in turns after one call to warm up."""
    times = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken += [] if turn == 0 else [1000 * (time.perf_counter() - start)]
    return [median(taken) for taken in times]


def show(title: str, rows: dict[str, tuple]) -> None:
    """A small table: the first row has the names of the columns."""
    print(title)
    for name, values in rows.items():
        print(f"  {name:28}" + "".join(f"{value:>24}" for value in values))
