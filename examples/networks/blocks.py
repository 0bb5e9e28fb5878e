"""What LeNet-5, VGG11 and the Unet are made of: a convolution with its activation, and a LISTAConv in its place."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

import dsc_ops

Activation = Literal["relu", "elu", "mish"]
First = Literal["conv", "lista"]

ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "mish": nn.Mish}


def conv_block(
    inputs: int, outputs: int, kernel: int, activation: Activation, *, padding: int = 0, batch_norm: bool = False
) -> nn.Sequential:
    """Convolution, batch norm if asked for, activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, it takes one of {', '.join(ACTIVATIONS)}")
    layers = OrderedDict(conv=nn.Conv2d(inputs, outputs, kernel, padding=padding))
    if batch_norm:
        layers["norm"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(layers | {"activation": ACTIVATIONS[activation]()})


def lista_block(inputs: int, outputs: int, kernel: int, *, padding: int = 0) -> dsc_ops.LISTAConv:
    """Three LISTA iterations: the drop-in for a block that sees the pictures, whatever that block has inside.

    One-sided: with one iteration, it would be convolution and relu. Its thresholds are what makes the codes sparse, so
    neither batch norm nor an activation follows.
    """
    return dsc_ops.LISTAConv(inputs, outputs, kernel, iterations=3, padding=padding, one_sided=True)


def check_first(first: First) -> None:
    if first not in ("conv", "lista"):
        raise ValueError(f"first is {first!r}, it takes conv or lista")
