"""Residual networks as convolutional sparse coding: Res-CSC, its simplification, ResNet and the plain network."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from dsc_ops.layers.csc import ResCSCBlock

Kind = Literal["res-csc", "simplified", "resnet", "plain"]


class ResCSC(nn.Sequential):
    """The networks of 6 n + 2 layers for CIFAR: a convolution, three stages of n pairs, average pool and classifier.

    Args:
        layers: 20, 56, 110 and 218 are the paper's; any 6 n + 2.
        kind: of the pairs, see :class:`dsc_ops.layers.csc.ResCSCBlock`.
        classes: number of outputs.
        width: channels of the first stage; 16 is the paper's.

    Source: Zhang, Zhang (National Science Review, 2021); as "resnet" He et al. (2016).
    """

    # What a sparsity penalty takes, and whose density is logged.
    BLOCKS = FEATURES = ("stage1", "stage2", "stage3")

    def __init__(self, layers: int = 20, kind: Kind = "res-csc", *, classes: int = 10, width: int = 16):
        if layers < 8 or layers % 6 != 2:
            raise ValueError(f"ResCSC: layers is {layers}, it takes 6 n + 2: 20, 56, 110, 218")
        stem = OrderedDict(conv=nn.Conv2d(3, width, 3, padding=1, bias=False), norm=nn.BatchNorm2d(width))
        nn.init.kaiming_normal_(stem["conv"].weight, mode="fan_out", nonlinearity="relu")
        parts, inputs = OrderedDict(stem=nn.Sequential(stem | {"activation": nn.ReLU()})), width
        for stage in range(3):
            blocks, outputs = [], width * 2**stage
            for number in range((layers - 2) // 6):
                blocks.append(ResCSCBlock(inputs, outputs, 2 if stage and not number else 1, kind=kind))
                inputs = outputs
            parts[f"stage{stage + 1}"] = nn.Sequential(*blocks)
        super().__init__(
            parts | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(inputs, classes)}
        )
