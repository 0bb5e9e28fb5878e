"""Fused sparse coding layers for PyTorch: LISTA-CP, convolutional soft thresholding, the l1 feature penalty."""

# First the operators, then what PyTorch has to know of them, then what is built on both.
from dsc_ops import _library
from dsc_ops import _autograd  # isort: skip
from dsc_ops import functional, layers, reference
from dsc_ops.layers import (
    ConvSoftThreshold,
    ConvSoftThreshold1d,
    LISTAConv,
    LISTAConv1d,
    LISTALinear,
    SoftThreshold,
    SparsityPenalty,
)

__all__ = [
    "ConvSoftThreshold",
    "ConvSoftThreshold1d",
    "LISTAConv",
    "LISTAConv1d",
    "LISTALinear",
    "SoftThreshold",
    "SparsityPenalty",
    "functional",
    "layers",
    "reference",
]
__version__: str = _library.information()["version"]
