"""`python -m examples.experiments GROUP --hours H`: the runs of the papers' tables under a budget of time."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import write_whole
from examples import require_extras


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other, and the seeds that each is run with."""

    rows: tuple[str, ...]
    seeds: int


CSC = {
    "mlcsc": ("mlcsc-cifar-ml-ista", "mlcsc-cifar-cnn"),
    "msdcsc": ("msdnet6", "msdcsc6-1", "msdcsc6-2"),
    "rescsc": ("rescsc-20", "resnet-20", "plain-20"),
    "sdnet": ("sdnet10", "resnet10"),
}
GROUPS = {
    "lenet5": Group(tuple(f"lenet5-{name}{l1}" for name in ("relu", "elu", "mish") for l1 in ("", "-l1")), 3),
    "vgg11": Group(("vgg11-relu", "vgg11-relu-l1"), 1),
    "unet": Group(("unet", "unet-l1"), 2),
    **{name: Group(rows, 1) for name, rows in CSC.items()},
    "csc": Group(tuple(row for rows in CSC.values() for row in rows), 1),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.experiments",
        description="Run a group of rows of the papers' tables. First each row is tried for an epoch; from these times "
        "follows the number of epochs that fit the budget, the same for all rows, and the learning rate's fall ends "
        "with them. Both stand in OUTPUT/GROUP.json, so that the same command, after a kill, goes on as planned: "
        "finished runs are not run again, an unfinished one goes on from its checkpoint.",
        epilog="Groups: " + "; ".join(f"{name}: {', '.join(g.rows)}, {g.seeds} seeds" for name, g in GROUPS.items()),
    )
    add = made.add_argument
    add("group", choices=GROUPS, help="which rows")
    add(
        "--hours",
        type=float,
        required=True,
        help="budget of time for all runs together; for the plan, if there is none",
    )
    add("--jobs", type=int, default=1, help="runs at the same time, which share the cores (%(default)s)")
    add("--seeds", type=int, help="seeds of each row (default: as listed below)")
    add("--output", type=Path, default=Path("runs/experiments"), help="folder of all runs (%(default)s)")
    add(
        "--options",
        type=shlex.split,
        default=[],
        help="of python -m examples.train, for all runs, in one string: '--data.init_args.batch_size 64'",
    )
    return made


class Runs:
    """The runs of a group, at most ``jobs`` at the same time."""

    def __init__(self, jobs: int, options: Iterable[str]):
        self.jobs, self.options = jobs, list(options)

    def train(self, row: str, seed: int, epochs: int, output: Path) -> dict[str, Any]:
        """Run a row to its end, unless that was done, and return its run.json; its console goes to a file beside."""
        found = read(output)
        if found.get("finished") and found["epochs"] == epochs:
            return found
        command = [sys.executable, "-m", "examples.train", "fit", "--config", f"examples/configs/{row}.yaml"]
        command += [f"--seed_everything={seed}", f"--trainer.max_epochs={epochs}", f"--output={output}", *self.options]
        output.mkdir(parents=True, exist_ok=True)
        threads = max(len(os.sched_getaffinity(0)) // self.jobs, 1)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        with open(output / "console.txt", "a") as console:
            try:
                # The program that is started holds the lock too, and may outlive this one.
                fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"{output} is in use by a run that has not ended: wait for it, or end it") from None
            done = subprocess.run(command, env=environment, stdout=console, stderr=console)
        if done.returncode:
            message = f"{row}, seed {seed}, ended with status {done.returncode}: see {output / 'console.txt'}"
            tqdm.write(message)  # the other runs go on
            raise RuntimeError(message)
        return read(output)

    def all(self, runs: list[tuple[str, int, int, Path]], title: str) -> list[dict[str, Any]]:
        """Run all of these, with a bar that counts their epochs; their run.json."""
        with (
            ThreadPoolExecutor(self.jobs) as pool,
            tqdm(total=sum(epochs for _, _, epochs, _ in runs), desc=title, unit="epoch", smoothing=0) as bar,
        ):
            futures = [pool.submit(self.train, *run) for run in runs]
            try:
                waiting = futures
                while waiting:
                    _, waiting = wait(futures, timeout=2)
                    bar.update(sum(read(folder).get("epochs", 0) for *_, folder in runs) - bar.n)
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()


def read(folder: Path) -> dict[str, Any]:
    """The run.json of a run; empty when there is none yet."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def epochs_that_fit(seconds: float, epoch: float, start: float, *, seeds: int, jobs: int) -> int:
    """Epochs of each run, given the seconds that one epoch of all rows takes, and starting their programs."""
    return int((seconds * jobs / seeds - start) / epoch)


def make_plan(options: argparse.Namespace, runs: Runs) -> dict[str, Any]:
    """Try each row for an epoch and choose the epochs that fit."""
    rows, seeds = GROUPS[options.group].rows, options.seeds or GROUPS[options.group].seeds
    begin = time.monotonic()
    trials = runs.all([(row, 0, 1, options.output / "trials" / row) for row in rows], "one epoch of each row")
    tried = time.monotonic() - begin
    seconds = {row: 3600 * trial["hours"] for row, trial in zip(rows, trials, strict=True)}
    epoch = sum(seconds.values())
    start = max(tried * runs.jobs - epoch, 0)
    epochs = epochs_that_fit(3600 * options.hours - tried, epoch, start, seeds=seeds, jobs=runs.jobs)
    if epochs < 1:
        least = (tried + seeds * (start + epoch) / runs.jobs) / 3600
        sys.exit(f"--hours is {options.hours:g}; one epoch of each run already takes {least:.2g}")
    return {
        "epochs": epochs,
        "seeds": seeds,
        "hours": options.hours,
        "jobs": runs.jobs,
        "options": runs.options,
        "seconds_per_epoch": seconds,
    }


def run(options: argparse.Namespace) -> None:
    """Plan the group unless that was done, and make its runs, all rows of a seed before the next seed."""
    path = options.output / f"{options.group}.json"
    if not path.exists():
        plan = make_plan(options, Runs(options.jobs, options.options))
        write_whole(path, json.dumps(plan, indent=2) + "\n")
    plan = json.loads(path.read_text())
    print(f"{path}: {plan['epochs']} epochs, {plan['seeds']} seeds, {plan['jobs']} at a time; remove it to plan anew")
    rows = GROUPS[options.group].rows
    runs = [
        (row, seed, plan["epochs"], options.output / row / f"seed{seed}")
        for seed in range(plan["seeds"])
        for row in rows
    ]
    Runs(plan["jobs"], plan["options"]).all(runs, options.group)
    print(f"python -m examples.report shows the results of {options.output}")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    require_extras()
    try:
        run(options)
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last checkpoints.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
