"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from examples import require_extras

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "performance"
TRIAL = Path("runs")  # of runs that are not whole
NO_GPU = 3  # the exit status where a GPU was asked for and none is there


def parser() -> argparse.ArgumentParser:
    from benchmarks.cases import CASES, DENSITIES, SETTINGS
    from benchmarks.contenders import MODES
    from benchmarks.run import SECTIONS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time the fused K-step LISTA against the best that plain PyTorch and torch.compile do, in turns, "
        "beside the machine's own limits, and the convolutional sparse coding layers against their plain writings; "
        "print medians, spread (interquartile range) and the ratio to the fastest baseline. A whole run, without "
        "options, takes 15 to 45 minutes on two cores and writes benchmarks/results/MACHINE.json and the "
        "figures in docs/performance; any other writes into runs/.",
        epilog="cases: "
        + "; ".join(f"{case.name} ({case.why})" for case in CASES.values())
        + ". sections: "
        + "; ".join(f"{name} ({what})" for name, what in SECTIONS.items())
        + ".",
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="a few minutes: density 0.1, K unrolled iterations, no compilation, no csc, no peers",
    )
    add(
        "--check",
        action="store_true",
        help="measure what --quick measures and compare the ratios with those committed for this kind of machine: exit "
        "status 1 on a loss of more than 15 %%, 0 without one or where nothing is committed for this machine",
    )
    add("--draw", type=Path, metavar="FILE", help="measure nothing, only draw the figures of a JSON file")
    add("--sections", nargs="+", choices=SECTIONS, metavar="NAME", help="which sections (default: all)")
    add("--cases", nargs="+", choices=CASES, metavar="NAME", help="which cases (default: all)")
    add("--settings", nargs="+", choices=SETTINGS, help="which signals (default: all; random at the first density)")
    add("--batch", type=int, help="another batch than the cases' own")
    add(
        "--densities",
        nargs="+",
        type=float,
        metavar="P",
        help="of the last code, above 0 and up to 1; all baselines run at the first, the fastest of them at the others "
        f"(default: 0.1, then the rest of {DENSITIES})",
    )
    add("--iterations", nargs="+", type=int, metavar="K", help="K of the cases, 1 is a step from the tenth code (10 1)")
    add("--modes", nargs="+", choices=MODES, help="codes alone, or with gradients (default: both)")
    add("--memory-iterations", nargs="+", type=int, metavar="K", help="K of the memory's figure (1 2 5 10 20)")
    add("--dtype", choices=("float32", "float64", "bfloat16", "float16"), help="of the cases (default: float32)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to measure; cuda writes benchmarks/results/GPU.json, and without a GPU ends with exit status 3",
    )
    add(
        "--roofline",
        action="store_true",
        help="measure nothing: print bytes, operations and predicted times of the CUDA kernels of each case on an "
        "A100, an H100 and an RTX 4090 from datasheet limits, beside the bytes of packed codes and eager's prediction",
    )
    add(
        "--profile",
        action="store_true",
        help="compare nothing: print what each CPU kernel of a training step takes, by perf and callgrind (Linux "
        "packages linux-perf and valgrind; half an hour), with AVX-512 by perf alone; for all cases at the "
        "default density it writes docs/performance/profile-MACHINE.md",
    )
    add("--threads", type=int, help="number of CPU threads (default: torch's)")
    add("--repeats", type=int, help="rounds of turns (default: 5, 3 with --quick)")
    add("--no-compile", action="store_true", help="without torch.compile")
    add("--output", type=Path, metavar="FILE", help="another JSON file, beside which the figures are put")
    return parser


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    commands = parser()
    options = commands.parse_args(arguments)
    for name in ("batch", "iterations", "memory_iterations", "threads", "repeats"):
        value = getattr(options, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            commands.error(f"--{name.replace('_', '-')} is {value}, it takes at least 1")
    if options.densities and not all(0 < p <= 1 for p in options.densities):
        commands.error(f"--densities is {options.densities}, it takes numbers above 0 and up to 1")
    if options.check and (options.quick or options.draw or options.output):
        commands.error("--check stands without --quick, --draw and --output: it writes nothing")
    if options.roofline and (options.quick or options.check or options.draw or options.output):
        commands.error(
            "--roofline stands without --quick, --check, --draw and --output: it measures and writes nothing"
        )
    if options.profile and (options.quick or options.check or options.draw or options.roofline or options.output):
        commands.error("--profile stands without --quick, --check, --draw, --roofline and --output")
    if options.draw and not options.draw.is_file():
        commands.error(f"--draw is {options.draw}, it takes a file that is there")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 when --check found a loss or a row could not be measured, 3 when there is no GPU."""
    require_extras()
    try:
        return perform(options_of(arguments))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: nothing was written.")


def perform(options: argparse.Namespace) -> int:
    """What the options ask for, and the exit status."""
    import torch

    from benchmarks import run
    from benchmarks.cases import CASES
    from benchmarks.figures import draw

    if options.draw:
        show(draw(run.read(options.draw)["rows"], FIGURES))
        return 0

    if options.roofline:
        print("\n".join(roofline_lines(options)))
        return 0
    if options.profile:
        return profiled(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks: --device cuda needs a GPU, and torch {torch.__version__} finds none here.", file=sys.stderr)
        return NO_GPU

    chosen = {
        name: getattr(options, name)
        for name in (
            "sections",
            "settings",
            "densities",
            "iterations",
            "modes",
            "memory_iterations",
            "threads",
            "repeats",
        )
        if getattr(options, name) is not None
    }
    if options.cases or options.batch:
        cases = [CASES[name] for name in options.cases or CASES]
        chosen["cases"] = [case.scaled(options.batch or case.batch) for case in cases]
    if options.dtype:
        chosen["dtype"] = getattr(torch, options.dtype)
    plan = run.Plan(**chosen)
    if options.no_compile:
        plan = replace(plan, baselines=[name for name in plan.baselines if name != "compile"])
    if options.quick or options.check:
        plan = plan.quick()
    plan = plan.on(options.device)

    if options.check:
        return compare(plan)
    whole = plan == run.Plan().on(options.device)
    results = run.run(plan)
    default = RESULTS / f"{results['machine']['name']}.json" if whole else TRIAL / "benchmarks.json"
    output = options.output or default
    run.write(output, results)
    figures = FIGURES if options.device == "cpu" else FIGURES / results["machine"]["name"]
    folder = figures if whole and not options.output else output.parent / "performance"
    show([output, *draw(results["rows"], folder)])
    return 1 if results["failed"] else 0


def roofline_lines(options: argparse.Namespace) -> list[str]:
    from benchmarks.cases import CASES
    from benchmarks.roofline import report

    cases = [CASES[name] for name in options.cases or CASES]
    cases = [case.scaled(options.batch or case.batch) for case in cases]
    return report(cases, options.densities or (0.1,), (options.iterations or [10])[0])


def profiled(options: argparse.Namespace) -> int:
    """--profile: the exit status."""
    from benchmarks import profile
    from benchmarks.cases import CASES
    from benchmarks.machine import machine, machine_name, write_whole

    if obstacle := profile.missing():
        sys.exit(f"benchmarks: {obstacle}")
    density, iterations = (options.densities or [0.1])[0], (options.iterations or [10])[0]
    rows = profile.measure_all([CASES[name] for name in options.cases or CASES], density, iterations)
    facts = machine()
    text = profile.page(rows, facts, density, iterations)
    if not (options.cases or options.densities or options.iterations):
        output = FIGURES / f"profile-{machine_name(facts)}.md"
        write_whole(output, text)
        show([output])
    return 0


def compare(plan) -> int:
    """--check: the exit status."""
    from benchmarks import run
    from benchmarks.check import check

    with run.torch_threads(plan.threads):
        name = run.machine_name(run.machine(plan.device))
    committed = RESULTS / f"{name}.json"
    if not committed.is_file():
        print(f"Nothing to compare with: no results are committed for this kind of machine ({name}).")
        return 0
    losses = check(run.read(committed), run.steps(plan), run.say)
    for loss in losses:
        print(f"LOSS  {loss}")
    return 1 if losses else 0


def show(files: list[Path]) -> None:
    print("Written: " + ", ".join(map(str, files)))
