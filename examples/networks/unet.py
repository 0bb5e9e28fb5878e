"""The Unet of five encoders and four decoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.networks.blocks import Activation, First, check_first, conv_block, lista_block


class UNet(nn.Module):
    """Pictures (N, 3, H, W) to one logit a pixel, (N, 1, H, W); H and W are multiples of 16.

    Five encoders with max-pools between, four decoders: each doubles the size by a transposed 2 x 2 convolution, and
    takes the encoder's output of that size beside it. Li, Feng, Zhou give these numbers; our choices, those of the
    usual Unet, are: an encoder or decoder is two padded 3 x 3 convolutions, each with batch norm and activation;
    channels double from ``width`` to 16 ``width``; the head is a 1 x 1 convolution.

    Args:
        in_channels: of the pictures.
        width: channels of the first encoder; 64 is the usual Unet, less is for CPUs.
        activation: relu, elu or mish.
        first: conv, or lista for a LISTAConv with ``width`` code channels in place of the first encoder.
    """

    # What the sparsity penalty takes: the first four encoder blocks.
    BLOCKS = ("encoder1", "encoder2", "encoder3", "encoder4")
    # Whose density is logged.
    FEATURES = (*BLOCKS, "encoder5")

    def __init__(
        self, in_channels: int = 3, width: int = 64, *, activation: Activation = "relu", first: First = "conv"
    ):
        super().__init__()
        check_first(first)
        if width < 1:
            raise ValueError(f"width is {width}, it takes at least 1")

        def double(inputs: int, outputs: int) -> nn.Module:
            blocks = (conv_block(c, outputs, 3, activation, padding=1, batch_norm=True) for c in (inputs, outputs))
            return nn.Sequential(*blocks)

        channels = [width * 2**level for level in range(5)]
        self.encoder1 = (
            lista_block(in_channels, width, 3, padding=1) if first == "lista" else double(in_channels, width)
        )
        for level in range(1, 5):
            self.add_module(f"encoder{level + 1}", double(channels[level - 1], channels[level]))
        self.pool = nn.MaxPool2d(2)
        for level in range(4, 0, -1):
            self.add_module(f"up{level}", nn.ConvTranspose2d(channels[level], channels[level - 1], 2, stride=2))
            self.add_module(f"decoder{level}", double(2 * channels[level - 1], channels[level - 1]))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or any(length % 16 for length in images.shape[2:]):
            raise ValueError(
                f"UNet: images has shape {tuple(images.shape)}, it takes (N, C, H, W), H, W multiples of 16"
            )
        x, skips = images, []
        for level in range(1, 6):
            x = self.get_submodule(f"encoder{level}")(x if level == 1 else self.pool(x))
            skips.append(x)
        for level in range(4, 0, -1):
            x = torch.cat((skips[level - 1], self.get_submodule(f"up{level}")(x)), dim=1)
            x = self.get_submodule(f"decoder{level}")(x)
        return self.head(x)
