"""What LeNet-5, VGG11 and the Unet are made of: a convolution with its activation, and a LISTAConv in its place."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import nn

import dsc_ops

Activation = Literal["relu", "elu", "mish"]
First = Literal["conv", "lista"]

START_LAM = 1.0
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
    neither batch norm nor an activation follows. It starts as ISTA with lam = theta L = 1, at which a tenth or so of
    the codes of pictures with deviation 1 are not zero, however many atoms there are.
    """
    layer = dsc_ops.LISTAConv(inputs, outputs, kernel, iterations=3, padding=padding, one_sided=True)
    with torch.no_grad():
        layer.theta.fill_(START_LAM / layer.lipschitz())
    return layer


def check_first(first: First) -> None:
    if first not in ("conv", "lista"):
        raise ValueError(f"first is {first!r}, it takes conv or lista")
