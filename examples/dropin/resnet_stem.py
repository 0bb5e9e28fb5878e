"""`python -m examples.dropin.resnet_stem`: the stem of a resnet18 as a LISTAConv. `--help` tells the rest."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn

import dsc_ops
from examples import dropin


def replace_stem(model: nn.Module, iterations: int = 3, theta: float = 0.1) -> dsc_ops.LISTAConv:
    """Put a LISTAConv in the place of conv1, bn1 and relu of a torchvision ResNet; all else stays as it is."""
    conv = model.conv1
    stem = dsc_ops.LISTAConv(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        iterations,
        stride=conv.stride,
        padding=conv.padding,
        theta=theta,
        one_sided=True,  # codes of one sign, as ReLU's outputs are
    )
    model.conv1, model.bn1, model.relu = stem, nn.Identity(), nn.Identity()
    return stem


def main(arguments: list[str] | None = None) -> int:
    parser = dropin.parser(
        "resnet_stem",
        "Take torchvision's resnet18, put a LISTAConv in the place of its stem (convolution, batch norm, ReLU), and "
        "train both for a few steps on pictures of stripes in four directions. Prints what changed: parameters, the "
        "shape after the stem, how many of its values are not zero, accuracy on new pictures, and the time of a step.",
    )
    options = parser.parse_args(arguments)
    dropin.require("torchvision")
    from torchvision.models import resnet18

    steps, size = (2, 48) if options.fast else (options.steps, 64)
    columns = {}
    models = {}
    for name in ("stock", "LISTAConv stem"):
        torch.manual_seed(options.seed)
        model = resnet18(weights=None, num_classes=4)
        if name != "stock":
            replace_stem(model)
        models[name] = model
        dropin.train(
            lambda x, y, model=model: F.cross_entropy(model(x), y),
            model.parameters(),
            lambda number: dropin.stripes(16, size, options.seed + number),
            steps,
        )
        images, labels = dropin.stripes(64, size, options.seed + 10**6)
        with torch.no_grad():
            codes = model.eval().relu(model.bn1(model.conv1(images)))
            accuracy = (model(images).argmax(1) == labels).float().mean()
        stem = sum(p.numel() for p in [*model.conv1.parameters(), *model.bn1.parameters()])
        parameters = sum(p.numel() for p in model.parameters())
        columns[name] = [name, f"{parameters:,}", f"{stem:,}", str(tuple(codes.shape[1:]))]
        columns[name] += [f"{dsc_ops.functional.density(codes):.3f}", f"{accuracy:.2f}"]
    images, labels = dropin.stripes(16, size, options.seed)
    calls = [lambda m=m: F.cross_entropy(m(images), labels).backward() for m in models.values()]
    times = dropin.milliseconds(*calls, repeats=1 if options.fast else 5)
    rows = ("", "parameters", "of these in the stem", "shape after the stem", "density after the stem", "accuracy")
    table = {row: values for row, values in zip(rows, zip(*columns.values(), strict=True), strict=True)}
    table["forward and backward"] = tuple(f"{time:.0f} ms" for time in times)
    dropin.show(f"resnet18 after {steps} steps", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
