"""The layers: nn.Modules around :mod:`dsc_ops.functional`."""

from dsc_ops.layers import csc  # noqa: F401  a room of its own
from dsc_ops.layers.atoms import UnitNormAtoms
from dsc_ops.layers.lista import LISTAConv, LISTAConv1d, LISTALinear
from dsc_ops.layers.penalty import SparsityPenalty
from dsc_ops.layers.threshold import ConvSoftThreshold, ConvSoftThreshold1d, SoftThreshold

__all__ = [
    "ConvSoftThreshold",
    "ConvSoftThreshold1d",
    "LISTAConv",
    "LISTAConv1d",
    "LISTALinear",
    "SoftThreshold",
    "SparsityPenalty",
    "UnitNormAtoms",
]
