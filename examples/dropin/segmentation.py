"""`python -m examples.dropin.segmentation`: an l1 penalty on a U-Net's decoder. `--help` tells the rest."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsc_ops
from examples import dropin

LAYERS = "decoder.blocks.?.conv2"  # the end of each decoder block


def overlap(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Intersection over union of the predicted masks."""
    with torch.no_grad():
        found, wanted = model.eval()(images) > 0, masks > 0
    return float((found & wanted).sum() / (found | wanted).sum().clamp(min=1))


def main(arguments: list[str] | None = None) -> int:
    parser = dropin.parser(
        "segmentation",
        "Train a U-Net of segmentation-models-pytorch (encoder resnet18, no downloaded weights) on pictures of a disc, "
        "without and with dsc_ops.SparsityPenalty on the ends of its decoder's blocks. Prints the density of each "
        "block in the last step, and how well the masks of new pictures are found. The model itself is not changed.",
        gamma=0.1,
    )
    options = parser.parse_args(arguments)
    dropin.require("segmentation_models_pytorch")
    import segmentation_models_pytorch as smp

    steps, size = (4, 32) if options.fast else (options.steps, 64)
    columns = {}
    for gamma in (0.0, options.gamma):
        torch.manual_seed(options.seed)
        model = smp.Unet("resnet18", encoder_weights=None, classes=1)
        penalty = dsc_ops.SparsityPenalty(model, LAYERS, gamma)
        dropin.train(
            lambda x, y, model=model, penalty=penalty: F.binary_cross_entropy_with_logits(model(x), y) + penalty(),
            model.parameters(),
            lambda number: dropin.discs(8, size, options.seed + number),
            steps,
        )
        columns[gamma] = {name: f"{value:.3f}" for name, value in penalty.density().items()}  # of the last step
        penalty.remove()  # for good: no hook is left in the model
        columns[gamma]["overlap"] = f"{overlap(model, *dropin.discs(32, size, options.seed + 10**6)):.2f}"
    plain, sparse = columns.values()
    rows = {"": ("without", f"gamma = {options.gamma}")} | {name: (plain[name], sparse[name]) for name in plain}
    dropin.show(f"Density of the U-Net's decoder after {steps} steps", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
