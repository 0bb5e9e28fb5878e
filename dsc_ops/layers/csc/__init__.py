"""The convolutional sparse coding family: the published networks' blocks as layers."""

from dsc_ops.layers.csc.conversion import Conversion, convert
from dsc_ops.layers.csc.convolutional import CSCConv
from dsc_ops.layers.csc.dilated import MSDCSCBlock
from dsc_ops.layers.csc.multilayer import MLCSC
from dsc_ops.layers.csc.residual import ResCSCBlock
from dsc_ops.layers.csc.robust import LambdaRelation, adapted_lambda, fit_lambda

__all__ = [
    "CSCConv",
    "Conversion",
    "LambdaRelation",
    "MLCSC",
    "MSDCSCBlock",
    "ResCSCBlock",
    "adapted_lambda",
    "convert",
    "fit_lambda",
]
