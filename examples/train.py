"""`python -m examples.train fit --config examples/configs/ROW.yaml`: train a row of the papers' tables by Lightning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from examples import require_extras

require_extras("jsonargparse", "tensorboard", "torchvision")

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from benchmarks.machine import machine, write_whole
from examples.tasks import Task
from examples.training import Bar, step_of

CONFIGS = Path(__file__).parent / "configs"
RUNS = Path("runs/experiments")


def commit() -> str:
    """The commit of the checkout, with + where files differ from it; empty where there is no git."""
    try:
        described = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(described, cwd=CONFIGS, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Record(Timer):
    """OUTPUT/run.json: what makes a run what it is, and when it is finished, the hours that it took."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        super().__init__()
        self.path, self.facts = path, facts

    def on_fit_start(self, trainer: Trainer, *arguments) -> None:
        super().on_fit_start(trainer, *arguments)
        self.facts["data"] = getattr(trainer.datamodule, "label", type(trainer.datamodule).__name__)
        self.write(trainer, finished=False)

    def on_fit_end(self, trainer: Trainer, *arguments) -> None:
        finished = trainer.state.status == "finished" or trainer.current_epoch >= trainer.max_epochs
        self.write(trainer, finished=finished)

    def write(self, trainer: Trainer, *, finished: bool) -> None:
        if trainer.is_global_zero:
            progress = {"finished": finished, "epochs": trainer.current_epoch, "seconds": self.time_elapsed()}
            write_whole(self.path, json.dumps(self.facts | progress, indent=2) + "\n")
