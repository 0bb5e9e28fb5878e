"""Mixed-scale dense networks as convolutional sparse coding: MSDNet and MSD-CSC."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

from torch import nn

from dsc_ops.layers.csc import MSDCSCBlock
from examples.networks.blocks import conv_block

Solver = Literal["ista", "fista"]


class MSDCSC(nn.Sequential):
    """MSDNet and MSD-CSC as in Zhang, Zhang (National Science Review, 2021), on pictures (N, 3, H, W).

    d layers of dilations 1, 2, 3, 1, ... with a max-pool after a third and two thirds of them, global average pool and
    classifier. The layers between two pools are a block, whose codes are estimated together.

    Args:
        depth: d, a multiple of 3; 6, 9 and 12 are the paper's.
        unfoldings: of each block; 0 is MSDNet.
        solver: "ista" or "fista".
        classes: number of outputs.
        width: w, channels that a layer adds.
    """

    # What a sparsity penalty takes, and whose density is logged.
    BLOCKS = FEATURES = ("block1", "block2", "block3")

    def __init__(
        self, depth: int = 12, unfoldings: int = 0, solver: Solver = "ista", *, classes: int = 10, width: int = 32
    ):
        if depth < 3 or depth % 3:
            raise ValueError(f"MSDCSC: depth is {depth}, it takes a multiple of 3")
        third, channels = depth // 3, 3
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(3):
            dilations = [layer % 3 + 1 for layer in range(number * third, (number + 1) * third)]
            parts[f"block{number + 1}"] = MSDCSCBlock(width, dilations, unfoldings, solver, in_channels=channels)
            parts[f"pool{number + 1}"] = nn.MaxPool2d(2) if number < 2 else nn.AdaptiveAvgPool2d(1)
            channels += third * width
        super().__init__(parts | {"flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)})


class MSDCSCBlocks(nn.Sequential):
    """The network that the authors of MSD-CSC published as code: three blocks of 12 layers with transitions between.

    A convolution to 16 channels with batch norm and ReLU; blocks of growth 12 and dilations 1 .. 6, twice; after the
    first two a 1 x 1 convolution and a max-pool; average pool over 8 x 8 pixels and classifier.

    Args:
        unfoldings, solver, classes: as in :class:`MSDCSC`.
        growth: channels that a layer adds; 12 is theirs, less is for tests.
    """

    BLOCKS = FEATURES = MSDCSC.FEATURES

    def __init__(self, unfoldings: int = 1, solver: Solver = "ista", *, classes: int = 10, growth: int = 12):
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv_block(3, 16, 3, "relu", padding=1, batch_norm=True))
        _start(parts["stem"].conv)
        nn.init.zeros_(parts["stem"].conv.bias)
        channels, dilations = 16, [layer % 6 + 1 for layer in range(12)]
        for number in (1, 2, 3):
            parts[f"block{number}"] = MSDCSCBlock(growth, dilations, unfoldings, solver, in_channels=channels)
            channels += 12 * growth
            if number < 3:
                parts[f"transition{number}"] = nn.Conv2d(channels, channels, 1, bias=False)
                _start(parts[f"transition{number}"])
                parts[f"pool{number}"] = nn.MaxPool2d(2)
        parts |= {"pool3": nn.AvgPool2d(8), "flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)}
        super().__init__(parts)


def _start(conv: nn.Conv2d) -> None:
    """As the filters of the blocks."""
    nn.init.normal_(conv.weight, std=0.1 / math.sqrt(conv.weight[0].numel()))
