"""What the networks of the papers learn: classes of pictures, or masks. `examples.train` trains them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import dsc_ops
from examples.training import Learner, cosine


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=5e-4)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.005)


class Task(Learner):
    """A network with the penalty on its BLOCKS; the density of its FEATURES is measured in validation."""

    def on_validation_epoch_start(self) -> None:
        self.densities = dsc_ops.SparsityPenalty(self.network, self.network.FEATURES, 0.0)

    def on_validation_epoch_end(self) -> None:
        self.densities.remove()

    def validate(self, batch: tuple[Tensor, Tensor], suffix: str = "") -> Tensor:
        """Log loss and densities of a batch, and return what the network says about it."""
        inputs, targets = batch
        outputs = self.network(inputs)
        self.log_mean(f"val_loss{suffix}", self.loss(outputs, targets), targets)
        for name, density in self.densities.density().items():
            self.log_mean(f"density/{name}{suffix}", density, targets)
        return outputs


class Classification(Task):
    """Classes of pictures by cross entropy.

    Args:
        network: pictures (N, C, H, W) to logits (N, classes); its BLOCKS are penalised, its FEATURES measured.
        gamma: weight of the penalty.
        optimizer: its learning rate falls as half a cosine. Default: SGD, learning rate 0.1, weight decay 5e-4; the
            paper names no momentum, so there is none.
        classes: number of classes.
    """

    def __init__(self, network: nn.Module, gamma: float = 0.0, optimizer: OptimizerCallable = sgd, classes: int = 10):
        super().__init__(network, F.cross_entropy, optimizer, penalised=network.BLOCKS, gamma=gamma, schedule=cosine)
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.accuracy(self.validate(batch), batch[1])
        self.log("val_accuracy", self.accuracy, prog_bar=True)
