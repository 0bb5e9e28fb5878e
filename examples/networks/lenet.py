"""LeNet-5."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from examples.networks.blocks import ACTIVATIONS, Activation, First, check_first, conv_block, lista_block


class LeNet5(nn.Sequential):
    """LeNet-5 as in Li, Feng, Zhou: conv5-6, pool, conv5-16, pool, FC120, FC84, FC10, padding 0.

    Args:
        in_channels: 3 for CIFAR-10, 1 for grey digits.
        size: height and width of the pictures: 32 for CIFAR-10, 28 for MNIST.
        classes: number of outputs.
        activation: relu, elu or mish, after every layer but the last.
        first: conv, or lista for a LISTAConv with 6 code channels in place of the first block.
    """

    # What the sparsity penalty takes: the outputs of the convolutional blocks, far from the classifier.
    BLOCKS = ("block1", "block2")
    # Whose density is logged.
    FEATURES = BLOCKS

    def __init__(
        self,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        *,
        activation: Activation = "relu",
        first: First = "conv",
    ):
        check_first(first)
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"size is {size}, it takes at least 16: two unpadded 5 x 5 convolutions with pools")

        def dense(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, outputs), ACTIVATIONS[activation]())

        super().__init__(
            OrderedDict(
                block1=lista_block(in_channels, 6, 5)
                if first == "lista"
                else conv_block(in_channels, 6, 5, activation),
                pool1=nn.MaxPool2d(2),
                block2=conv_block(6, 16, 5, activation),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=dense(16 * side**2, 120),
                fc2=dense(120, 84),
                fc3=nn.Linear(84, classes),
            )
        )
