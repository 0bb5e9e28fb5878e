"""`python -m examples.dropin.timm_globs`: an l1 penalty on layers of a timm model, by glob. `--help` tells the rest."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

import dsc_ops
from examples import dropin


def main(arguments: list[str] | None = None) -> int:
    parser = dropin.parser(
        "timm_globs",
        "Train a model of timm (no downloaded weights) on pictures of stripes, without and with "
        "dsc_ops.SparsityPenalty on the layers whose names match a glob. Prints which these are, their density in the "
        "last step, and the accuracy on new pictures.",
        gamma=1.0,
    )
    parser.add_argument("--model", default="resnet18", help="name of a timm model (%(default)s)")
    parser.add_argument("--layers", default="layer[234].*.act2", help="glob of layers (default: %(default)s)")
    options = parser.parse_args(arguments)
    dropin.require("timm")
    import timm

    steps, size = (4, 32) if options.fast else (options.steps, 64)
    columns = {}
    for gamma in (0.0, options.gamma):
        torch.manual_seed(options.seed)
        model = timm.create_model(options.model, pretrained=False, num_classes=4)
        penalty = dsc_ops.SparsityPenalty(model, options.layers, gamma)
        dropin.train(
            lambda x, y, model=model, penalty=penalty: F.cross_entropy(model(x), y) + penalty(),
            model.parameters(),
            lambda number: dropin.stripes(16, size, options.seed + number),
            steps,
        )
        columns[gamma] = {name: f"{value:.3f}" for name, value in penalty.density().items()}  # of the last step
        penalty.remove()  # for good: no hook is left in the model
        images, labels = dropin.stripes(64, size, options.seed + 10**6)
        with torch.no_grad():
            accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
        columns[gamma]["accuracy"] = f"{accuracy:.2f}"
    plain, sparse = columns.values()
    rows = {"": ("without", f"gamma = {options.gamma}")} | {name: (plain[name], sparse[name]) for name in plain}
    dropin.show(f"Density of {options.layers} of {options.model} after {steps} steps", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
