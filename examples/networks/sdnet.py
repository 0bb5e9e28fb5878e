"""SDNet: ResNets of which the first convolution, or every one, is a layer of convolutional sparse coding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from dsc_ops.layers.csc import CSCConv

Coded = Literal["none", "stem", "all"]
Stem = Literal["cifar", "imagenet"]
Convolution = Callable[..., nn.Module]

# Blocks of the four stages. Ten layers are ours, for CPUs.
STAGES = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)


def convolved(make: Convolution, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution or sparse coding, and batch norm."""
    return nn.Sequential(OrderedDict(conv=make(inputs, outputs, kernel, stride=stride), norm=nn.BatchNorm2d(outputs)))


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions; between two layers of sparse coding there is no ReLU."""

    def __init__(self, make: Convolution, inputs: int, outputs: int, stride: int, shortcut: bool):
        super().__init__()
        self.first, self.second = convolved(make, inputs, outputs, 3, stride), convolved(make, outputs, outputs, 3)
        self.between = nn.ReLU() if make is convolution else nn.Identity()
        self.shortcut = None
        if shortcut:
            same = stride == 1 and inputs == outputs
            self.shortcut = nn.Identity() if same else convolved(make, inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        u = self.second(self.between(self.first(x)))
        return (u if self.shortcut is None else u + self.shortcut(x)).relu()


class SDNet(nn.Sequential):
    """SDNet-18 and -34 as in Dai et al. (NeurIPS 2022), and the ResNets that they are made of.

    Args:
        layers: 18 or 34; 10, for CPUs, has one block a stage.
        coded: which convolutions are CSCConv layers of codes >= 0: "stem", the first, followed by batch norm and no
            ReLU; "all"; or "none", which is ResNet.
        shortcut: False leaves out the shortcuts.
        stem: "cifar", 3 x 3, or "imagenet", 7 x 7 with stride 2 and a max-pool.
        classes: number of outputs.
        lam, iterations: of every CSCConv: weight of the l1 norm, steps of FISTA.
        width: channels of the first stage; 64 is the paper's, less is for CPUs.
    """

    # What a sparsity penalty takes, and whose density is logged.
    BLOCKS = FEATURES = ("stem.conv",)

    def __init__(
        self,
        layers: Literal[10, 18, 34] = 18,
        coded: Coded = "stem",
        shortcut: bool = True,
        *,
        stem: Stem = "cifar",
        classes: int = 10,
        lam: float = 0.1,
        iterations: int = 2,
        width: int = 64,
    ):
        for name, value, allowed in (
            ("layers", layers, tuple(STAGES)),
            ("coded", coded, Coded.__args__),
            ("stem", stem, Stem.__args__),
        ):
            if value not in allowed:
                raise ValueError(f"SDNet: {name} is {value!r}, it takes one of {', '.join(map(str, allowed))}")
        code = partial(CSCConv, iterations=iterations, lam=lam)
        make = code if coded == "all" else convolution
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        first = convolved(convolution if coded == "none" else code, 3, width, kernel, stride)
        if coded == "none":
            first.append(nn.ReLU())
        if stem == "imagenet":
            first.append(nn.MaxPool2d(3, 2, 1))
        parts, inputs = OrderedDict(stem=first), width
        for stage, count in enumerate(STAGES[layers]):
            blocks, outputs = [], width * 2**stage
            for number in range(count):
                blocks.append(BasicBlock(make, inputs, outputs, 2 if stage and not number else 1, shortcut))
                inputs = outputs
            parts[f"stage{stage + 1}"] = nn.Sequential(*blocks)
        parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(inputs, classes)}
        super().__init__(parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
