"""The convolutional sparse coding layers against plain writings of the same blocks.

A training step, forward and backward, of each block, in time and in memory. Its baselines:

    plain       the published definition in plain PyTorch, dsc_ops.layers.csc.reference, with the same parameters
    conv+relu   a convolution with ReLU in the place of an SDNet layer: the price of sparse coding
    resnet      ResNet-56 in the place of Res-CSC-56: the price of c

Only "plain" computes the same, which is compared before the clock starts. A row has one baseline. SDNet layers follow
their dictionary by a step of power iteration, as in training; the plain writing has L for nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.cases import centred, crops
from benchmarks.contenders import warm_up
from benchmarks.timing import FUSED, full_float32, ratio, summary, take_turns, torch_threads
from dsc_ops.layers.csc import MLCSC, CSCConv, MSDCSCBlock, reference
from examples.networks import MSDCSC, ResCSC

Step = Callable[[], tuple[Tensor, ...]]
MODES = ("training", "memory")


@dataclass(frozen=True)
class Block:
    """What is measured: makes the training steps of all contenders for a batch on a device."""

    make: Callable[[int, str], dict[str, Step]]
    batch: int
    baselines: tuple[str, ...] = ("plain",)


def pictures(batch: int, device: str) -> Tensor:
    """Crops of photographs (N, 3, 32, 32) with the mean and deviation that networks get."""
    y = centred(torch.stack(list(crops(batch, (32, 32), torch.Generator().manual_seed(0), colour=True))))
    return (y / y.std()).to(device)


def step_of(forward: Callable[[Tensor], Tensor], y: Tensor, parameters: Sequence[Tensor]) -> Step:
    """Forward and backward from 1/2 ||result||^2 to the filters, and to the signal where it has a gradient."""
    wanted = [p for p in parameters if p.dim() == 4] + [y] * y.requires_grad

    def step() -> tuple[Tensor, ...]:
        result = forward(y)
        return torch.autograd.grad(result, wanted, result.detach())

    return step


def sdnet(channels: int, iterations: int) -> Callable[[int, str], dict[str, Step]]:
    """An SDNet layer with 64 atoms of 3 x 3 on pictures, or on normalised codes of such a layer."""

    def make(batch: int, device: str) -> dict[str, Step]:
        torch.manual_seed(0)
        y = pictures(batch, device)
        if channels > 3:
            with torch.no_grad():
                y = nn.BatchNorm2d(channels, device=device)(CSCConv(3, channels, 3).to(device)(y))
            y.requires_grad_()
        layer, conv = (kind.to(device) for kind in (CSCConv(channels, 64, 3, iterations), nn.Conv2d(channels, 64, 3)))
        atoms, length = layer.parametrizations.dictionary.original, 0.9 / layer.lipschitz

        def fused(y: Tensor) -> Tensor:
            with torch.no_grad():
                atoms.mul_(1)  # as an optimizer does: the layer sees a changed dictionary
            return layer(y)

        def plain(y: Tensor) -> Tensor:
            return reference.csc_conv(y, layer.dictionary, layer.lam, length, iterations, layer.stride, layer.padding)

        def conv_relu(y: Tensor) -> Tensor:
            return F.conv2d(y, conv.weight, conv.bias, padding=1).relu()

        return {
            FUSED: step_of(fused, y, [atoms]),
            "plain": step_of(plain, y, [atoms]),
            "conv+relu": step_of(conv_relu, y, list(conv.parameters())),
        }

    return make


def ml_ista(batch: int, device: str) -> dict[str, Step]:
    """The three dictionaries of ML-ISTA for CIFAR, six unfoldings."""
    torch.manual_seed(0)
    model = MLCSC([nn.Conv2d(c, m, 4, 2, 1) for c, m in ((3, 32), (32, 64), (64, 128))], "ml-ista", 6)
    model.reset_parameters()
    model, y = model.to(device), pictures(batch, device)

    def plain(y: Tensor) -> Tensor:
        lists = zip(*((layer.dictionary, -layer.theta, layer.scale) for layer in model.layers), strict=True)
        return reference.ml_csc(y, *lists, [(2, 1)] * 3, "ml-ista", 6)[-1]

    return {name: step_of(way, y, list(model.parameters())) for name, way in ((FUSED, model), ("plain", plain))}


def plain_msd_csc(block: MSDCSCBlock) -> Callable[[Tensor], Tensor]:
    """A new block in training, with its concatenations."""
    layers = block.layers
    norms = [[nn.BatchNorm2d(len(layer.bias)).to(layer.bias) for layer in layers] for _ in range(1 + block.unfoldings)]
    parts = [[getattr(layer, name) for layer in layers] for name in ("dictionary", "scale", "bias")]
    return lambda x: reference.msd_csc(x, *parts, norms, block.dilations, block.unfoldings)


def msd_csc_block(batch: int, device: str) -> dict[str, Step]:
    """The first block of the authors' network: 12 layers of growth 12 on 16 channels, two unfoldings."""
    torch.manual_seed(0)
    block = MSDCSCBlock(12, [layer % 6 + 1 for layer in range(12)], 2, in_channels=16).to(device)
    y = torch.randn(batch, 16, 32, 32, device=device).relu_().requires_grad_()
    ways = {FUSED: block, "plain": plain_msd_csc(block)}
    return {name: step_of(way, y, list(block.parameters())) for name, way in ways.items()}


def msd_csc(batch: int, device: str) -> dict[str, Step]:
    """The network of d = 12 with two unfoldings."""
    torch.manual_seed(0)
    network, y = MSDCSC(12, 2).to(device), pictures(batch, device)
    blocks = {name: plain_msd_csc(block) for name, block in network.named_children() if name.startswith("block")}

    def forward(x: Tensor) -> Tensor:
        for name, module in network.named_children():
            x = blocks.get(name, module)(x)
        return x

    return {name: step_of(way, y, list(network.parameters())) for name, way in ((FUSED, network), ("plain", forward))}


def res_csc(batch: int, device: str) -> dict[str, Step]:
    """Res-CSC-56."""
    torch.manual_seed(0)
    network, resnet = (ResCSC(56, kind).to(device) for kind in ("res-csc", "resnet"))
    y = pictures(batch, device)

    def plain(x: Tensor) -> Tensor:
        x = network.stem(x)
        for block in (block for stage in (network.stage1, network.stage2, network.stage3) for block in stage):
            x = reference.res_csc(x, tuple(block.dictionaries), block.norms, block.scale, block.stride)
        return network.fc(x.mean((2, 3)))

    ways = {FUSED: (network, network), "plain": (plain, network), "resnet": (resnet, resnet)}
    return {name: step_of(way, y, list(owner.parameters())) for name, (way, owner) in ways.items()}


BLOCKS = {
    **{
        f"sdnet-{channels}-64, K={iterations}": Block(sdnet(channels, iterations), 64, ("plain", "conv+relu"))
        for channels in (3, 64)
        for iterations in (2, 16)
    },
    "ml-ista, T=6": Block(ml_ista, 64),
    "msd-csc-block, 2": Block(msd_csc_block, 16),
    "msd-csc-12, 2": Block(msd_csc, 8),
    "res-csc-56": Block(res_csc, 32, ("plain", "resnet")),
}


def measure(
    name: str,
    baseline: str,
    mode: str,
    *,
    repeats: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    batch: int | None = None,
) -> dict[str, Any]:
    """Time or peak memory of a training step of a block, and how many times as much a baseline takes."""
    batch = batch or BLOCKS[name].batch
    with torch_threads(threads), full_float32():
        used = torch.get_num_threads()
        if mode == "memory":
            peaks = {way: bytes_of(name, way, batch, used, device) for way in (FUSED, baseline)}
            contenders = {way: {"median": peak, "iqr": 0} for way, peak in peaks.items()}
        else:
            made = BLOCKS[name].make(batch, device)
            calls = {way: made[way] for way in (FUSED, baseline)}
            if baseline == "plain":
                warm_up(calls)
            contenders = {way: summary(times) for way, times in take_turns(calls, repeats, device).items()}
    return {
        "case": name,
        "operator": f"over {baseline}",
        "batch": batch,
        "mode": mode,
        "threads": used,
        "contenders": contenders,
        "fastest": baseline,
        "ratio": ratio(contenders),
    }


def bytes_of(name: str, way: str, batch: int, threads: int, device: str) -> int:
    """Peak memory of a training step: on a CPU by a process of its own, see :mod:`benchmarks.memory`."""
    if device != "cpu":
        return memory.peak_on_gpu(BLOCKS[name].make(batch, device)[way], device)
    return memory.ask("benchmarks.csc", name, way, str(batch), str(threads))


def child(name: str, way: str, batch: str, threads: str) -> int:
    """What the child does: a small step, which loads the libraries, and then the one that is measured."""
    torch.set_num_threads(int(threads))
    BLOCKS[name].make(2, "cpu")[way]()
    return memory.peak_above(BLOCKS[name].make(int(batch), "cpu")[way])


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
