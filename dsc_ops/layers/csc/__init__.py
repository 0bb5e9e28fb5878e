"""The convolutional sparse coding family: the published networks' blocks as layers."""

from dsc_ops.layers.csc.convolutional import CSCConv
from dsc_ops.layers.csc.dilated import MSDCSCBlock
from dsc_ops.layers.csc.multilayer import MLCSC

__all__ = ["CSCConv", "MLCSC", "MSDCSCBlock"]
