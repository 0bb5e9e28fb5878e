"""`python -m examples.theory`: the promises of dsc_ops.theory beside what is measured. `--help` tells what it does."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples import require_extras
from examples.demo import Formatter, read

STEPS = {
    "depth": "Error of the codes of 1, 2 and 3 layers against the number of iterations, with the bound: layer by layer "
    "and deepest first, without and with noise.",
    "stability": "How far codes can be from the true ones, layer by layer: the bound, what is found by trying, and two "
    "earlier bounds.",
    "activation": "Error of certified networks with other activations against their beta and slope L.",
    "cnn": "Depth and weights of LISTA-CP as a convolutional network against the stated orders.",
    "failures": "The simulated experiment of Zhang and Zhang: coordinates that MSD-CSC and ML-CSC fail to reconstruct, "
    "iteration by iteration, on 100 classes of signals of length 100.",
    "benchmark": "The sparse recovery benchmark of the literature (250 measurements, 500 entries, 16 layers): ISTA, "
    "FISTA, LISTA, LISTA-CP, LISTA-CP with support selection and ALISTA, without noise and at 40, 30 and 20 dB. It "
    "trains 16 networks, which takes most of the time; a run that was interrupted goes on from the last stage.",
}


@dataclass(frozen=True)
class DepthSettings:
    """Sizes of the first step; sizes and girths as in examples.deep.model."""

    sizes: tuple[int, ...] = (64, 160, 200)
    girths: tuple[int, ...] = (6, 5)
    nonzeros: tuple[int, ...] = (4, 2, 1)  # of the deepest code, for 1, 2, 3 layers
    deltas: tuple[float, ...] = (0.0, 1e-3)
    depths: tuple[int, ...] = (1, *range(5, 151, 5))
    count: int = 500


@dataclass(frozen=True)
class StabilitySettings:
    """Sizes of the second step."""

    rows: int = 256
    noise: float = 0.1
    trials: int = 500


@dataclass(frozen=True)
class ActivationSettings:
    """Sizes of the third step."""

    betas: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    slopes: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    iterations: int = 80
    count: int = 500


@dataclass(frozen=True)
class CnnSettings:
    """Sizes of the fourth step."""

    widths: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    kernels: tuple[int, ...] = (2, 3, 5)
    iterations: int = 3


@dataclass(frozen=True)
class FailuresSettings:
    """Sizes of the fifth step."""

    classes: int = 100
    length: int = 100
    channels: tuple[int, ...] = (8, 12, 16)
    kernel: int = 5
    beta: float = 0.05
    iterations: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class BenchmarkSettings:
    """Sizes of the last step: those of examples.recovery.Settings that differ from its defaults."""

    changes: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "depth": DepthSettings,
    "stability": StabilitySettings,
    "activation": ActivationSettings,
    "cnn": CnnSettings,
    "failures": FailuresSettings,
    "benchmark": BenchmarkSettings,
}
FAST = {
    "depth": DepthSettings(sizes=(16, 34), girths=(4,), nonzeros=(2, 1), depths=(1, 10, 20), count=20),
    "stability": StabilitySettings(trials=20),
    "activation": ActivationSettings(betas=(1e-1, 1e-2), slopes=(1e-2, 1.0), iterations=10, count=20),
    "cnn": CnnSettings(widths=(8, 16), kernels=(2, 3), iterations=1),
    "failures": FailuresSettings(classes=10, channels=(4, 4), iterations=(1, 4, 16)),
    "benchmark": BenchmarkSettings(
        {
            "m": 20,
            "d": 40,
            "layers": 3,
            "snrs": [20.0],
            "batch": 16,
            "steps_per_stage": 4,
            "final_stages": 1,
            "test": 50,
            "lams": [0.1],
        }
    ),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.theory",
        description="What the theory promises for deep sparse coding, drawn beside what is measured. Each step writes "
        "its results, OUTPUT/STEP/results.json, and its figure, FIGURES/theory-STEP.png; docs/theory.md explains them. "
        "The benchmark takes about half an hour on one core, all else two minutes. Nothing is downloaded.",
        epilog="Interrupted, the same command goes on where it stopped: finished steps and networks are not run again, "
        "and training goes on from the checkpoint of its last stage.\n\nSteps:\n"
        + "\n".join(f"  {name:12}{text}" for name, text in STEPS.items()),
        formatter_class=Formatter,
    )
    add = made.add_argument
    add("--output", type=Path, default=Path("runs/theory"), help="folder of checkpoints and results (%(default)s)")
    add("--figures", type=Path, help="folder of the figures (default: OUTPUT)")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="only these steps (default: all)")
    add("--seed", type=int, default=0, help="of dictionaries, codes, noise and training (%(default)s)")
    add("--fast", action="store_true", help="small sizes, to see that it runs: the results mean nothing")
    add("--restart", action="store_true", help="start the chosen steps over")
    return made


def depth(settings: DepthSettings, seed: int, folder: Path) -> dict[str, Any]:
    from examples import deep

    cases = []
    for layers, nonzeros in enumerate(settings.nonzeros, start=1):
        dictionaries = deep.model(settings.sizes[:layers], settings.girths[: layers - 1], seed)
        found = deep.errors_against_depth(
            dictionaries, nonzeros, settings.deltas, settings.depths, settings.count, seed
        )
        cases += [{"layers": layers, **row} for row in found]
    return {"cases": cases}


def stability(settings: StabilitySettings, seed: int, folder: Path) -> dict[str, Any]:
    from examples import deep

    return deep.stability(settings.rows, settings.noise, settings.trials, seed)


def activation(settings: ActivationSettings, seed: int, folder: Path) -> dict[str, Any]:
    from examples import deep

    return deep.errors_against_activation(**asdict(settings), seed=seed)


def cnn(settings: CnnSettings, seed: int, folder: Path) -> dict[str, Any]:
    from examples import deep

    return {"networks": deep.network_sizes(settings.widths, settings.kernels, settings.iterations)}


def failures(settings: FailuresSettings, seed: int, folder: Path) -> dict[str, Any]:
    from examples import deep

    return deep.reconstruction_failures(**asdict(settings), seed=seed)


def benchmark(settings: BenchmarkSettings, seed: int, folder: Path) -> dict[str, Any]:
    from examples import recovery

    return recovery.benchmark(recovery_settings(settings), seed, folder)


def recovery_settings(settings: BenchmarkSettings) -> Any:
    from examples import recovery

    return recovery.Settings(**settings.changes)


def key(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that the results of a step depend on, as JSON has it."""
    settings = FAST[step] if options.fast else SETTINGS[step]()
    if step == "benchmark":
        settings = recovery_settings(settings)
    return json.loads(json.dumps({"settings": asdict(settings), "seed": options.seed}))


def run_step(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of a step: read when it was finished before, else made in its folder, which may hold checkpoints."""
    from benchmarks.run import machine, write_whole

    folder, wanted = options.output / step, key(step, options)
    same = read(folder / "settings.json") == wanted
    if same and not options.restart and (results := read(folder / "results.json")):
        print(f"{step}: finished before (--restart runs it again)")
        return results
    if options.restart or not same:
        if (folder / "settings.json").exists():
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            sys.exit(f"{folder} holds something that is not this program's: choose another --output")
        write_whole(folder / "settings.json", json.dumps(wanted, indent=2) + "\n")
    print(f"{step}: {STEPS[step].split(': ')[0].rstrip('.')}.", flush=True)
    start = time.perf_counter()
    results = globals()[step](FAST[step] if options.fast else SETTINGS[step](), options.seed, folder)
    results |= {"seconds": time.perf_counter() - start, "machine": machine(), **wanted}
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def run(options: argparse.Namespace) -> int:
    """Run the chosen steps, draw and print their results; the exit status, 1 where a promise was broken."""
    from examples import theory_figures

    figures, kept = options.figures or options.output, True
    for step in STEPS:
        if step in options.steps:
            results = run_step(step, options)
            print(theory_figures.text(step, results))
            print(f"The figure: {theory_figures.write(step, results, figures)}", flush=True)
            for promise, holds in theory_figures.promises(step, results).items():
                print(f"{'holds   ' if holds else 'BROKEN'}  {promise}")
                kept &= holds
    if options.fast:
        print("This was a run with --fast: its numbers mean nothing.")
    return 0 if kept else 1


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 1 when a promise was broken."""
    options = parser().parse_args(arguments)
    require_extras()
    try:
        return run(options)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last stage.")


if __name__ == "__main__":
    sys.exit(main())
