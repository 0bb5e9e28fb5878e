"""Multi-layer convolutional sparse coding as a classifier: ML-ISTA and its kin."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

from torch import nn

from dsc_ops.layers.csc import MLCSC

Version = Literal["mnist", "cifar", "six"]
Method = Literal["layered-thresholding", "layered-ista", "ml-ista", "ml-fista", "ml-lista"]

# Of each dictionary: atoms, kernel, stride, padding.
LAYOUTS = {
    "mnist": ((32, 6, 2, 0), (64, 6, 2, 0), (512, 4, 1, 0)),
    "cifar": ((32, 4, 2, 1), (64, 4, 2, 1), (128, 4, 2, 1)),
    "six": ((32, 4, 2, 1), (64, 4, 2, 1), (128, 4, 2, 1), (256, 3, 1, 1), (512, 3, 1, 1), (512, 3, 1, 1)),
}


class MLCSCNet(nn.Sequential):
    """The networks of Sulam et al. (TPAMI 2019), and that of six layers of Zhang, Zhang (2021).

    Args:
        version: "mnist", three dictionaries for 28 x 28 grey pictures, then the classifier; "cifar", three for 32 x 32
            pictures, three convolutions and the classifier; "six", six dictionaries, average pool and the classifier.
        method, unfoldings: of :class:`dsc_ops.layers.csc.MLCSC`; without unfoldings it is the CNN.
        classes: number of outputs.
        width: share of the papers' channels; less than 1 only for tests.
    """

    # What a sparsity penalty takes, and whose density is logged: the deepest codes.
    BLOCKS = FEATURES = ("codes",)

    def __init__(
        self,
        version: Version = "cifar",
        method: Method = "ml-ista",
        unfoldings: int = 6,
        *,
        classes: int = 10,
        width: float = 1.0,
    ):
        if version not in LAYOUTS:
            raise ValueError(f"MLCSCNet: version is {version!r}, it takes one of {', '.join(LAYOUTS)}")
        convolutions, channels = [], 1 if version == "mnist" else 3
        for atoms, *geometry in LAYOUTS[version]:
            atoms = max(round(width * atoms), 1)
            convolutions.append(nn.Conv2d(channels, atoms, *geometry))
            channels = atoms
        codes = MLCSC(convolutions, method, unfoldings)
        codes.reset_parameters()
        parts = OrderedDict(codes=codes)
        if version == "cifar":
            for number, (outputs, pool) in enumerate(((256, False), (512, True), (512, True)), 4):
                outputs = max(round(width * outputs), 1)
                parts[f"conv{number}"] = _convolution(channels, outputs, pool)
                channels = outputs
        elif version == "six":
            _start_as_ista(codes)
            parts["pool"] = nn.AdaptiveAvgPool2d(1)
        super().__init__(parts | {"flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)})


def _convolution(inputs: int, outputs: int, pool: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.normal_(conv.weight, std=1 / math.sqrt(conv.weight[0].numel()))
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []))


def _start_as_ista(codes: MLCSC) -> None:
    """Dictionaries with L near 1, so that c = 1 is a step of ISTA: six layers of the published start die away.

    A random dictionary whose atoms have norm s has L near s^2 (1 + sqrt(r))^2, r being its atoms for each value of the
    signal (Marchenko and Pastur's law).
    """
    for layer in codes.layers:
        atoms, channels = layer.dictionary.shape[:2]
        redundancy = atoms / (channels * math.prod(layer.geometry["stride"]))
        norm = 1 / (1 + math.sqrt(redundancy))
        for weight in (layer.dictionary, layer.analysis):
            if weight is not None:
                nn.init.normal_(weight, std=norm / math.sqrt(weight[0].numel()))
