"""Small state files of this version, which later versions have to load: layers, their state, an input and its codes.

python -m tests.support.state_files    writes states/VERSION.pt, once for each version that is given to people
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import dsc_ops

STATES = Path(__file__).parent / "states"

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SoftThreshold": lambda: dsc_ops.SoftThreshold(3),
    "SoftThreshold-mish": lambda: dsc_ops.SoftThreshold(3, activation="mish"),
    "ConvSoftThreshold": lambda: dsc_ops.ConvSoftThreshold(3, 4, (3, 2), 2, 1),
    "ConvSoftThreshold1d": lambda: dsc_ops.ConvSoftThreshold1d(3, 4, 3, bias=False, one_sided=True),
    "LISTAConv": lambda: dsc_ops.LISTAConv(3, 4, 3, 2),
    "LISTAConv-tied": lambda: dsc_ops.LISTAConv(3, 6, 5, 2, stride=2, groups=3, untied=False),
    "LISTAConv1d": lambda: dsc_ops.LISTAConv1d(3, 4, 5, 3, dilation=2),
    "LISTALinear": lambda: dsc_ops.LISTALinear(5, 7),
    "LISTALinear-tied": lambda: dsc_ops.LISTALinear(5, 7, 2, untied=False),
}


def signal(name: str) -> Tensor:
    return torch.randn((1, 3, 12) if "1d" in name else (1, 3, 4, 5)) * 2


def write(path: Path) -> None:
    torch.manual_seed(0)
    saved = {}
    for name, make in LAYERS.items():
        layer, y = make(), signal(name)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        saved[name] = dict(state=layer.state_dict(), y=y, codes=layer(y).detach())
    path.parent.mkdir(exist_ok=True)
    torch.save(saved, path)


if __name__ == "__main__":
    write(STATES / f"{dsc_ops.__version__}.pt")
