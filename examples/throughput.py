"""`python -m examples.throughput`: images a second in training, of plain networks and with a LISTAConv first."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsc_ops
from examples import require_extras

CONTENDERS = ("plain", "fused", "eager", "bfloat16")
CASES = {"lenet5": (128, 32), "vgg11": (32, 32), "unet": (4, 64)}  # batch, size of the pictures
UNET_WIDTH = 16


class Eager(nn.Module):
    """A LISTAConv in plain PyTorch: :func:`dsc_ops.reference.lista` in place of the fused operator."""

    def __init__(self, layer: dsc_ops.LISTAConv):
        super().__init__()
        self.layer = layer

    def forward(self, y: Tensor) -> Tensor:
        names = ("iterations", "stride", "padding", "dilation", "groups", "one_sided")
        options = {name: getattr(self.layer, name) for name in names}
        return dsc_ops.reference.lista(y, self.layer.dictionary, self.layer.analysis, self.layer.theta, **options)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.throughput",
        description="Time a training step (forward, backward, SGD) of each network: plain; with a LISTAConv in place "
        "of its first block; the same with that layer in plain PyTorch; and the plain one under autocast to bfloat16. "
        "They take turns, so other work on the machine falls on all alike; the medians, as images a second, go to "
        "OUTPUT/throughput.json, of which examples.report makes a table. Pictures are crops of photographs that come "
        "with scikit-image.",
    )
    add = made.add_argument
    add("networks", nargs="*", metavar="NETWORK", help=f"some of {', '.join(CASES)} (default: all)")
    add("--repeats", type=int, default=7, help="rounds of the median (%(default)s)")
    add("--threads", type=int, help="of PyTorch and the operators (default: as many as PyTorch takes)")
    add("--output", type=Path, default=Path("examples/results"), help="folder of the results (%(default)s)")
    return made


def make_network(name: str, contender: str) -> nn.Module:
    from examples.networks import VGG11, LeNet5, UNet

    torch.manual_seed(0)
    made = {"lenet5": LeNet5, "vgg11": VGG11, "unet": partial(UNet, width=UNET_WIDTH)}[name]
    network = made(first="conv" if contender in ("plain", "bfloat16") else "lista")
    if contender == "eager":
        first = network.BLOCKS[0]
        network.set_submodule(first, Eager(network.get_submodule(first)))
    return network


def crops(count: int, size: int) -> Tensor:
    """Random crops of colour photographs, (count, 3, size, size), of mean 0 and standard deviation 1."""
    from examples.data.photographs import photograph

    generator = torch.Generator().manual_seed(0)
    photographs = [photograph(name, colour=True) for name in ("astronaut.png", "coffee.png", "chelsea.png")]
    found = []
    for index in range(count):
        picture = photographs[index % len(photographs)]
        top, left = (int(torch.randint(n - size + 1, (), generator=generator)) for n in picture.shape[1:])
        found.append(picture[:, top : top + size, left : left + size])
    batch = torch.stack(found)
    return (batch - batch.mean()) / batch.std()


def training_step(network: nn.Module, images: Tensor, bfloat16: bool = False) -> Callable[[], None]:
    """A step of the network on these images: classes for those that classify, else masks; with autocast if asked."""
    masks = network(images).dim() == 4
    targets = (images[:, :1] > 0).float() if masks else torch.arange(len(images)) % 10
    loss = F.binary_cross_entropy_with_logits if masks else F.cross_entropy
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            outputs = network(images)
        loss(outputs.float(), targets).backward()
        optimizer.step()

    return step


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Images a second of the contenders, and the density of the codes at the start."""
    from examples.dropin import milliseconds

    batch, size = CASES[name]
    images = crops(batch, size)
    networks = {contender: make_network(name, contender) for contender in CONTENDERS}
    with torch.no_grad():
        codes = networks["fused"].get_submodule(networks["fused"].BLOCKS[0])(images)
    steps = [training_step(network, images, contender == "bfloat16") for contender, network in networks.items()]
    times = milliseconds(*steps, repeats=repeats)
    speeds = {contender: 1000 * batch / time for contender, time in zip(CONTENDERS, times, strict=True)}
    density = float(dsc_ops.functional.density(codes))
    return {"network": name, "batch": batch, "size": size, "density": density, "images_per_second": speeds}


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if unknown := set(options.networks) - CASES.keys():
        sys.exit(f"NETWORK is {', '.join(unknown)}; it takes some of {', '.join(CASES)}")
    require_extras()
    from tqdm import tqdm

    from benchmarks.machine import command, commit, machine, write_whole

    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    results = [measure(name, options.repeats) for name in tqdm(options.networks or CASES, unit="network")]
    facts = {
        "command": command("examples.throughput", arguments),
        "commit": commit(),
        "hours": (time.perf_counter() - start) / 3600,
        "contenders": CONTENDERS,
        "results": results,
        "repeats": options.repeats,
        "unet_width": UNET_WIDTH,
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    write_whole(options.output / "throughput.json", json.dumps(facts, indent=1) + "\n")
    for entry in results:
        print(entry["network"], {name: round(speed, 1) for name, speed in entry["images_per_second"].items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
