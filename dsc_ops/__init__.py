"""Fused sparse coding layers for PyTorch: LISTA-CP, convolutional soft thresholding, the l1 feature penalty."""

# isort: off
from dsc_ops import _library  # loads the operators: nothing may name them before
from dsc_ops import _autograd  # noqa: F401  tells PyTorch their gradients

# isort: on
from dsc_ops import functional, layers, reference, theory
from dsc_ops.layers import (
    ConvSoftThreshold,
    ConvSoftThreshold1d,
    LISTAConv,
    LISTAConv1d,
    LISTALinear,
    SoftThreshold,
    SparsityPenalty,
    UnitNormAtoms,
)

__all__ = [
    "ConvSoftThreshold",
    "ConvSoftThreshold1d",
    "LISTAConv",
    "LISTAConv1d",
    "LISTALinear",
    "SoftThreshold",
    "SparsityPenalty",
    "UnitNormAtoms",
    "functional",
    "layers",
    "reference",
    "theory",
]
__version__: str = _library.version
