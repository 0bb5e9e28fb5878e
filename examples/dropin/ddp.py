"""`torchrun --nproc-per-node 2 -m examples.dropin.ddp`: plain PyTorch on several processes. `--help` tells the rest."""

from __future__ import annotations

import gc
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dsc_ops
from examples import dropin

BATCH = 16  # of all processes together


def make_model() -> nn.Sequential:
    return nn.Sequential(
        dsc_ops.LISTAConv(3, 32, 5, iterations=3, stride=2, one_sided=True),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def difference(model: nn.Module) -> float:
    """The largest difference between any weight here and the same weight on the first process."""
    largest = torch.zeros(())
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, src=0)
        largest = torch.maximum(largest, (first - parameter.detach()).abs().max())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def run(options) -> None:
    """What each process does."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    if BATCH % processes:
        sys.exit(f"The batch of {BATCH} pictures cannot be shared equally by {processes} processes")
    steps, size = (5, 32) if options.fast else (options.steps, 48)
    torch.manual_seed(options.seed)
    model = make_model()
    penalty = dsc_ops.SparsityPenalty(model, ["0", "2"], options.gamma)  # of the model itself, not of its wrapper
    parallel = DistributedDataParallel(model)

    def step(images, labels):
        return F.cross_entropy(parallel(images), labels) + penalty()

    def share(number):  # of a batch that depends on the step alone
        images, labels = dropin.stripes(BATCH, size, options.seed + number)
        return images[rank::processes], labels[rank::processes]

    losses = torch.tensor(dropin.train(step, parallel.parameters(), share, steps))
    dist.all_reduce(losses)
    gap = difference(model)
    if rank == 0:
        rows = {"loss of the first step": (f"{losses[0] / processes:.5f}",)}
        rows |= {"loss of the last step": (f"{losses[-1] / processes:.5f}",)}
        rows |= {f"density of layer {name}": (f"{value:.3f}",) for name, value in penalty.density().items()}
        rows |= {"weights differ by": (f"{gap:g}",)}
        dropin.show(f"{processes} processes, {steps} steps", rows)


def main(arguments: list[str] | None = None) -> int:
    parser = dropin.parser(
        "ddp",
        "Train a small network with a LISTAConv and dsc_ops.SparsityPenalty under DistributedDataParallel, on CPUs "
        "with gloo. Start it with: torchrun --nproc-per-node 2 -m examples.dropin.ddp. The processes share each batch, "
        "so the losses are those of one process up to rounding. Prints losses, densities on the first process, and "
        "whether the weights of all processes are the same.",
        gamma=0.1,
    )
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" not in os.environ:
        sys.exit("This example runs under torchrun: torchrun --nproc-per-node 2 -m examples.dropin.ddp")
    dist.init_process_group("gloo")
    try:
        run(options)
    finally:
        gc.collect()  # DistributedDataParallel, whose cycles would keep gloo's threads alive into the interpreter's end
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
