"""The networks of the papers, one file each. Layers that a user would want are not here: they are in dsc_ops.layers."""

from examples.networks.denoiser import Denoiser, dct_atoms
from examples.networks.lenet import LeNet5
from examples.networks.unet import UNet
from examples.networks.vgg import VGG11

__all__ = ["Denoiser", "LeNet5", "UNet", "VGG11", "dct_atoms"]
