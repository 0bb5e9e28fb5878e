"""What the networks of the papers learn: classes of pictures, masks, clean pictures. `examples.train` trains them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image import PeakSignalNoiseRatio

import dsc_ops
from examples.metrics import MaskScores
from examples.training import Learner, cosine, falling


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.005)


class Task(Learner):
    """A network with the penalty on its BLOCKS; the density of its FEATURES is measured in validation."""

    def on_validation_epoch_start(self) -> None:
        self.densities = dsc_ops.SparsityPenalty(self.network, self.network.FEATURES, 0.0)

    def on_validation_epoch_end(self) -> None:
        self.densities.remove()

    def validate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Log loss and densities of a batch, and return what the network says about it."""
        outputs = self.network(inputs)
        self.log_mean("val_loss", self.loss(outputs, targets), targets)
        for name, density in self.densities.density().items():
            self.log_mean(f"density/{name}", density, targets)
        return outputs


class Classification(Task):
    """Classes of pictures by cross entropy.

    Args:
        network: pictures (N, C, H, W) to logits (N, classes); its BLOCKS are penalised, its FEATURES measured.
        gamma: weight of the penalty.
        optimizer: its learning rate falls as half a cosine. Default: SGD, learning rate 0.1, weight decay 5e-4. We know
            of no momentum in the paper; ours is 0.9, as is usual with these numbers. The rows of VGG11, which did not
            begin to learn with it, have none.
        classes: number of classes.
        milestones: fractions of training at which the learning rate is multiplied by ``decay``; none is the cosine.
        decay: see milestones.
    """

    def __init__(
        self,
        network: nn.Module,
        gamma: float = 0.0,
        optimizer: OptimizerCallable = sgd,
        classes: int = 10,
        milestones: Sequence[float] = (),
        decay: float = 0.1,
    ):
        schedule = falling(milestones, decay)
        super().__init__(network, F.cross_entropy, optimizer, penalised=network.BLOCKS, gamma=gamma, schedule=schedule)
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.accuracy(self.validate(*batch), batch[1])
        self.log("val_accuracy", self.accuracy, prog_bar=True)


class Segmentation(Task):
    """Masks of salient objects by binary cross entropy.

    Args:
        network: pictures (N, C, H, W) to logits (N, 1, H, W); its BLOCKS are penalised, its FEATURES measured.
        gamma: weight of the penalty.
        optimizer: its learning rate falls as half a cosine. Default: Adam, learning rate 0.005.

    At the end of training, the first test pictures go to masks.pt in the run's folder: images, masks and probabilities.
    """

    def __init__(self, network: nn.Module, gamma: float = 0.0, optimizer: OptimizerCallable = adam):
        loss = F.binary_cross_entropy_with_logits
        super().__init__(network, loss, optimizer, penalised=network.BLOCKS, gamma=gamma, schedule=cosine)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.scores = [MaskScores().to(self.device) for _ in self.trainer.num_val_batches]

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int, dataloader_idx: int = 0) -> None:
        images, masks = batch
        logits = self.validate(images, masks)
        self.scores[dataloader_idx].update(logits > 0, masks)
        if index == dataloader_idx == 0:
            self.shown = {"images": images, "masks": masks, "probabilities": logits.float().sigmoid()}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        for index, scores in enumerate(self.scores):
            suffix = f"/dataloader_idx_{index}" if len(self.scores) > 1 else ""  # as Lightning names the others
            found = {f"val_{name}{suffix}": value.float() for name, value in scores.compute().items()}
            self.log_dict(found, add_dataloader_idx=False)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            torch.save(
                {name: values.cpu() for name, values in self.shown.items()},
                Path(self.trainer.default_root_dir, "masks.pt"),
            )


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Summed over a picture, mean over the batch."""
    return F.mse_loss(outputs, targets, reduction="sum") / max(len(targets), 1)


class Denoising(Task):
    """Clean pictures from noisy ones, by the squared error of a whole picture; PSNR is measured in validation.

    Args:
        network: noisy pictures (N, 1, H, W) in [0, 1] to clean ones; the density of its FEATURES is measured.
        optimizer: its learning rate falls as in :class:`Classification`. Default: Adam, learning rate 0.005.
        milestones, decay: as in :class:`Classification`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = adam,
        milestones: Sequence[float] = (),
        decay: float = 0.1,
    ):
        super().__init__(network, squared_error, optimizer, schedule=falling(milestones, decay))
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.psnr(self.validate(*batch), batch[1])
        self.log("val_psnr", self.psnr, prog_bar=True)
