"""`python -m examples.dropin.lightning_module`: layers and penalty in a LightningModule. `--help` tells the rest."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dsc_ops
from examples import dropin


def make_classifier(gamma: float) -> nn.Module:
    """The module as its user would write it; Lightning is imported here, so that --help works without it."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(
                dsc_ops.LISTAConv(3, 32, 5, iterations=3, stride=2, one_sided=True),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(32, 4),
            )
            self.penalty = dsc_ops.SparsityPenalty(self.network, ["0", "3"], gamma)

        def training_step(self, batch, index):
            images, labels = batch
            loss = F.cross_entropy(self.network(images), labels) + self.penalty()
            self.log("loss", loss)
            self.log_dict({f"density/{name}": value for name, value in self.penalty.density().items()})
            return loss

        def validation_step(self, batch, index):
            images, labels = batch
            self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.network.parameters(), lr=3e-3)

    return Classifier()


def main(arguments: list[str] | None = None) -> int:
    parser = dropin.parser(
        "lightning_module",
        "Train a LightningModule with a LISTAConv as its first layer and dsc_ops.SparsityPenalty in its training_step, "
        "on pictures of stripes; the density of each layer is logged as any other number. Then load its checkpoint "
        "into a new module and check that both say the same. Prints what was logged.",
        gamma=0.1,
    )
    options = parser.parse_args(arguments)
    dropin.require("lightning")
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its list of accelerators, and tips
    for words in (".*does not have many workers.*", ".*LeafSpec.*", ".*logging interval.*", "Checkpoint directory .*"):
        warnings.filterwarnings("ignore", message=words)
    steps, size = (8, 32) if options.fast else (options.steps, 48)
    torch.manual_seed(options.seed)
    training = DataLoader(TensorDataset(*dropin.stripes(16 * steps, size, options.seed)), batch_size=16)
    test = DataLoader(TensorDataset(*dropin.stripes(64, size, options.seed + 10**6)), batch_size=64)
    classifier = make_classifier(options.gamma)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            enable_progress_bar=sys.stderr.isatty(),
            default_root_dir=folder,
        )
        trainer.fit(classifier, training, test)
        trainer.save_checkpoint(Path(folder, "last.ckpt"))
        state = torch.load(Path(folder, "last.ckpt"), weights_only=True)["state_dict"]
    again = make_classifier(options.gamma)
    again.load_state_dict(state)
    images = dropin.stripes(8, size, options.seed)[0]
    with torch.no_grad():
        same = torch.equal(again.eval().network(images), classifier.eval().network(images))
    logged = {name: (f"{float(value):.3f}",) for name, value in sorted(trainer.callback_metrics.items())}
    dropin.show(f"Logged after {steps} steps", logged | {"the checkpoint says the same": ("yes" if same else "NO",)})
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
