"""The networks of the papers, one file each. Layers that a user would want are not here: they are in dsc_ops.layers."""

from examples.networks.cscnet import CSCNet
from examples.networks.denoiser import Denoiser, dct_atoms
from examples.networks.lenet import LeNet5
from examples.networks.mlcsc import MLCSCNet
from examples.networks.msdcsc import MSDCSC, MSDCSCBlocks
from examples.networks.rescsc import ResCSC
from examples.networks.sdnet import SDNet
from examples.networks.unet import UNet
from examples.networks.vgg import VGG11

__all__ = [
    "CSCNet",
    "Denoiser",
    "LeNet5",
    "MLCSCNet",
    "MSDCSC",
    "MSDCSCBlocks",
    "ResCSC",
    "SDNet",
    "UNet",
    "VGG11",
    "dct_atoms",
]
