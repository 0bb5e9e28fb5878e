"""Lightning's command line for :mod:`examples.tasks`, and what a run writes: checkpoint, logs, run.json."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import dsc_ops
from benchmarks.machine import command, commit, machine, write_whole
from examples.tasks import Task
from examples.training import Bar, step_of

# Lightning's own call of a function of jsonargparse that is about to change.
warnings.filterwarnings("ignore", message="(?s).*``instantiate_classes`` was deprecated")
warnings.filterwarnings("ignore", message="(?s).*only one JsonargparseDeprecationWarning")

CONFIGS = Path(__file__).parent / "configs"
RUNS = Path("runs/experiments")
DESCRIPTION = "Train the networks of the papers; each row of their tables is a file of examples/configs."


class Record(Timer):
    """OUTPUT/run.json: what a run is, how far it has come, and the hours of training and validation that it took."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        super().__init__()
        self.path, self.facts = path, facts

    def write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            finished = trainer.current_epoch == trainer.max_epochs
            progress = {"finished": finished, "epochs": trainer.current_epoch, "hours": self.time_elapsed() / 3600}
            write_whole(self.path, json.dumps(self.facts | progress, indent=2) + "\n")

    def on_train_epoch_start(self, trainer: Trainer, *arguments) -> None:
        self.write(trainer)

    def on_fit_end(self, trainer: Trainer, *arguments) -> None:
        if hasattr(trainer.datamodule, "prior"):  # what a network's scores are compared with
            self.facts["prior"] = trainer.datamodule.prior()
        self.write(trainer)


class CLI(LightningCLI):
    """Lightning's command line, with a folder for all that a run writes, from which the same command goes on."""

    def __init__(self, arguments: list[str] | None = None, run: bool = True):
        base = {"default_config_files": [str(CONFIGS / "base.yaml")]}
        super().__init__(
            Task,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"description": DESCRIPTION} | ({"fit": base} if run else base),
            args=arguments,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output",
            type=Path | None,
            help="folder of checkpoint, logs and run.json; a run that was stopped goes on from the checkpoint there "
            f"(default: {RUNS}/ROW/seedS for --config ROW.yaml and --seed_everything S)",
        )
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Name the run and its folder."""
        config = self.config.get(str(self.subcommand), self.config)
        self.row = Path(str(config.config[-1])).stem if config.config else "unnamed"
        self.output = config.output or RUNS / self.row / f"seed{config.seed_everything}"
        settings = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_link_targets=False))
        self.settings = {key: settings[key] for key in ("seed_everything", "model", "data", "trainer")}

    def facts(self) -> dict[str, Any]:
        """What run.json says about the run from its start."""
        return {
            "row": self.row,
            "command": command("examples.train", None),
            "data": getattr(self.datamodule, "label", type(self.datamodule).__name__),
            "tests": getattr(self.datamodule, "test_labels", []),
            "versions": {library.__name__: library.__version__ for library in (dsc_ops, torch, lightning)},
            "commit": commit(),
            "machine": machine(),
            "settings": self.settings,
        }

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """The Trainer with this run's loggers, checkpoint after each epoch, progress bar and record."""
        config = self._get(self.config_init, "trainer")
        saver = ModelCheckpoint(
            self.output, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )
        bar = [] if config.enable_progress_bar is False else [Bar(self.row)]
        record = Record(self.output / "run.json", self.facts())
        loggers = [
            CSVLogger(self.output, name="csv", flush_logs_every_n_steps=1),
            TensorBoardLogger(self.output, name="tensorboard"),
        ]
        options |= {"logger": loggers, "callbacks": [*(config.callbacks or []), saver, *bar, record]}
        return super().instantiate_trainer(default_root_dir=str(self.output), **options)

    def before_fit(self) -> None:
        """Go on from the folder's checkpoint; a folder that holds another run ends the program with a sentence."""
        record, last = self.output / "run.json", self.output / "last.ckpt"
        if record.exists() and json.loads(record.read_text())["settings"] != self.settings:
            sys.exit(f"{self.output} holds a run with other settings, see run.json there: choose another --output")
        if last.exists() and self.config_init.fit.ckpt_path is None:
            print(f"{self.row}: going on from the checkpoint of step {step_of(last)}", flush=True)
            self.config_init.fit.ckpt_path = str(last)
