"""A small network of every layer, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsc_ops import ConvSoftThreshold, LISTAConv, LISTALinear, SoftThreshold


class Network(nn.Module):
    """Images (N, 2, H, W) of any size of at least 3 by 3 to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvSoftThreshold(2, 4, 3, padding=1, theta=0.01)
        self.codes = LISTAConv(4, 6, 3, 2, theta=0.01)
        self.shrink = SoftThreshold(6, 0.01, activation="elu")
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.dense = LISTALinear(24, 5, 2, theta=0.01)
        self.head = nn.Linear(5, 3)

    def forward(self, y: Tensor) -> Tensor:
        x = self.shrink(self.codes(self.first(y)))
        return self.head(self.dense(self.pool(x).flatten(1)))


PENALISED = ["first", "codes"]


def images(batch: int = 4, height: int = 6, width: int = 7) -> Tensor:
    return torch.randn(batch, 2, height, width)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerances) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerances)
