"""Training of the examples: one LightningModule for all networks, and a Trainer that goes on from its checkpoint."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader

import dsc_ops

# Lightning lists the accelerators that it found and gives tips; the demo has a console for people to read.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# Workers would make the runs' data depend on their number, and the pictures are in memory anyway.
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# The folder of the checkpoint holds a step's other files, and may hold the checkpoint to go on from.
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
# Lightning's own call of a torch function that is about to change.
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The learning rate rises in a fifth of the steps, then falls as a cosine."""
    return OneCycleLR(
        optimizer, max_lr=optimizer.defaults["lr"], total_steps=steps, pct_start=0.2, cycle_momentum=False
    )


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The learning rate falls to zero as half a cosine."""
    return CosineAnnealingLR(optimizer, T_max=steps)


def falling(milestones: Sequence[float], decay: float) -> Callable[[Optimizer, int], LRScheduler]:
    """A schedule that multiplies the learning rate by ``decay`` at these fractions of the training; cosine without."""
    if not all(0 < fraction < 1 for fraction in milestones):
        raise ValueError(f"milestones is {list(milestones)}, it takes fractions of the training, above 0 and below 1")
    if not milestones:
        return cosine
    return lambda optimizer, steps: MultiStepLR(optimizer, [round(steps * part) for part in milestones], decay)


class Learner(lightning.LightningModule):
    """A network with its loss, the l1 penalty on the outputs of some of its layers, and a schedule for all steps.

    Args:
        network: from the batch's inputs to what the loss takes.
        loss: of (outputs, targets).
        optimizer: makes the optimizer of parameters; its learning rate is the highest of the schedule.
        penalised: layers of the network for :class:`dsc_ops.SparsityPenalty`.
        gamma: weight of the penalty; 0 only measures.
        schedule: :func:`one_cycle`, :func:`cosine` or a :func:`falling` one.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        penalised: Sequence[str] = (),
        gamma: float = 0.0,
        schedule: Callable[[Optimizer, int], LRScheduler] = one_cycle,
    ):
        super().__init__()
        self.network, self.loss, self.optimizer, self.schedule = network, loss, optimizer, schedule
        self.gamma = gamma
        self.penalty = dsc_ops.SparsityPenalty(network, penalised, 1.0) if penalised else None

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        loss = self.loss(self.network(inputs), targets)
        self.log_mean("train_loss", loss, targets)
        if self.penalty is not None:
            norm = self.penalty()
            self.log_mean("train_l1", norm, targets)
            loss = loss + self.gamma * norm if self.gamma else loss
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def log_mean(self, name: str, value: Tensor | float, targets: Tensor) -> None:
        """Log the mean over the samples of an epoch, of all processes, given that of a batch with these targets."""
        self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(targets))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(self.network.parameters())
        schedule = self.schedule(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LossHistory(Callback):
    """The loss of each epoch, averaged over its steps; kept in the checkpoints."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.epoch: list[Tensor] = []

    def on_train_batch_end(self, trainer, learner, outputs, batch, index) -> None:
        self.epoch.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer, learner) -> None:
        self.losses.append(float(torch.stack(self.epoch).mean()))
        self.epoch = []

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses = list(state["losses"])


class Bar(TQDMProgressBar):
    """Lightning's progress bar with a name of what is trained."""

    def __init__(self, name: str):
        super().__init__(refresh_rate=5)
        self.name = name

    def on_train_epoch_start(self, trainer, *arguments) -> None:
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description(f"{self.name}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def get_metrics(self, trainer, learner) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, learner).items() if name != "v_num"}


def step_of(checkpoint: Path) -> int:
    """How far the training of a checkpoint had come; one that is damaged ends the program with a sentence."""
    try:
        return torch.load(checkpoint, weights_only=True)["global_step"]
    except Exception as error:  # torch.load has an exception for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.exit(f"{checkpoint} is damaged ({reason}): remove it, and the training begins anew")


def fit(learner: Learner, loader: DataLoader, epochs: int, folder: Path, name: str) -> list[float]:
    """Train for ``epochs`` epochs and return the loss of each.

    Each epoch ends with a checkpoint, ``folder``/last.ckpt; when there is one already, training goes on from it.
    """
    history = LossHistory()
    saver = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    last = folder / "last.ckpt"
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[history, saver, Bar(name)],
        logger=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    if last.exists():
        print(f"{name}: going on from the checkpoint of step {step_of(last)}")
    try:
        trainer.fit(learner, loader, ckpt_path=last if last.exists() else None)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    return history.losses
