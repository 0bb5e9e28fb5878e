"""What CUDA kernels are to cost: bytes, operations and predicted times, from shapes and densities. No measurement.

A kernel takes as long as the slowest of four things that a GPU does side by side, each at its datasheet's rate:

    memory        its bytes / bandwidth; each tensor is read or written once by each kernel, as if nothing were cached
    fp32          its additions and multiplications / peak, a fused one being two
    shared        its bytes from shared memory / (128 bytes a clock and multiprocessor)
    issue         its instructions of threads / (4 warps of 32 threads a clock and multiprocessor)

Kernels follow each other, so their times add up. Not counted: launches (a few microseconds each outside a CUDA graph),
multiprocessors that a small problem leaves idle, and what caches save. So a time is a bound for large problems and a
guide for others.

The kernels take the batch in slices, sized for the L2 cache, and a slice through all iterations before the next. What
a step then still moves to and from memory is `FROM_MEMORY`, under one assumption: what a slice keeps, two or three
codes, a gradient on their support and some signals, stays in the cache until it is used again. No time counts on it.

A step of LISTA on packed codes is `KERNELS`, one formula each; a wide dictionary or a matrix is left to the library's
convolution or matrix product and a fused threshold, `WIDE`; what eager PyTorch does instead is `EAGER`. Densities are
those of the codes between steps: the mean over K steps is about MEAN times that of the last code, as measured on the
CPU (`mean_density` in benchmarks/results).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.cases import CASES, Case

MEAN = 1.5  # the mean density of x_1, ..., x_K over that of x_K
WIDEST = 512  # products of an atom with a patch, up to which the kernels for packed codes are made

# Of a packed code: a mask of 8 bytes for 64 atoms of a pixel, and values of 4 bytes, those of a run of 8 pixels padded
# to 16 bytes, which is 6 bytes on average.
MASK, PADDING, VALUE = 8.0, 6 / 8, 4.0
# Code pixels of a block; that of the synthesis is lower for kernels cut into segments of up to four taps.
SYNTHESIS_TILE, LOW_SYNTHESIS_TILE, ANALYSIS_TILE, CORRELATION_TILE = (16, 32), (8, 32), (8, 16), (8, 32)
# For each slice of so many pixels of 64 atoms, the most blocks that write sums of their own of a weight's gradient.
GRADIENT_SLICE, PARTIALS = 2**17, 256
# Instructions of a thread: for each fused multiply-add of the analysis (many share a load of weights and signal), for
# each atom of a pixel in its threshold and packing, and for each product of the sparse kernels (a load besides).
ANALYSIS_INSTRUCTIONS, EPILOGUE_INSTRUCTIONS, SPARSE_INSTRUCTIONS = 242 / 224, 24, 2


@dataclass(frozen=True)
class Device:
    """Limits of a GPU: bytes and fp32 operations a second, multiprocessors, clocks a second (boost)."""

    name: str
    bandwidth: float
    fp32: float
    multiprocessors: int
    clock: float

    @property
    def shared(self) -> float:
        return 128 * self.multiprocessors * self.clock

    @property
    def issue(self) -> float:
        return 4 * 32 * self.multiprocessors * self.clock


# NVIDIA's datasheets: "A100 80GB SXM", "H100 SXM", "Ada GPU Architecture" (GeForce RTX 4090).
DEVICES = {
    "A100": Device("A100-SXM4-80GB", 2039e9, 19.5e12, 108, 1.41e9),
    "H100": Device("H100-SXM5-80GB", 3350e9, 67e12, 132, 1.98e9),
    "RTX 4090": Device("GeForce RTX 4090", 1008e9, 82.6e12, 128, 2.52e9),
}
# The ends of torch's names of GPUs that have these limits; other models of a family have others.
NAMES = {
    "A100-SXM4-80GB": DEVICES["A100"],
    "H100 80GB HBM3": DEVICES["H100"],
    "H200": Device("H200-SXM5-141GB", 4800e9, 67e12, 132, 1.98e9),
    "GeForce RTX 4090": DEVICES["RTX 4090"],
}


@dataclass(frozen=True)
class Shape:
    """The numbers of a case that costs depend on; ``density`` is that of the codes of the step."""

    batch: int
    channels: int
    atoms: int
    signal_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    code_size: tuple[int, int]
    density: float
    spatial: bool = True

    @property
    def wide(self) -> bool:
        return not self.spatial or self.products > WIDEST

    @property
    def pixels(self) -> int:
        return self.batch * math.prod(self.code_size)

    @property
    def products(self) -> int:
        """Multiplications of an atom with a patch."""
        return self.channels * math.prod(self.kernel)

    @property
    def non_zeros(self) -> float:
        return self.density * self.atoms * self.pixels

    @property
    def slabs(self) -> int:
        return -(-self.atoms // 64)

    @property
    def signal(self) -> float:
        """Bytes of a signal."""
        return VALUE * self.batch * self.channels * math.prod(self.signal_size)

    @property
    def code(self) -> float:
        """Bytes of a dense code."""
        return VALUE * self.pixels * self.atoms

    @property
    def weight(self) -> float:
        """Bytes of a dictionary."""
        return VALUE * self.atoms * self.products

    @property
    def masks(self) -> float:
        return MASK * self.slabs * self.pixels

    @property
    def values(self) -> float:
        """Bytes of the values of a packed code, or of a gradient on its support, as they lie."""
        return VALUE * self.non_zeros + PADDING * self.slabs * self.pixels

    @property
    def packed(self) -> float:
        """Bytes of a packed code as it lies."""
        return self.masks + self.values

    @property
    def least(self) -> float:
        """Bytes of the masks and the non-zeros alone."""
        return self.masks + VALUE * self.non_zeros

    @property
    def image(self) -> tuple[int, int, int]:
        """Images, rows and columns of code pixels; 1-D codes are the rows of one image."""
        return (1, self.batch, self.code_size[1]) if self.code_size[0] == 1 else (self.batch, *self.code_size)

    @property
    def synthesis_tile(self) -> tuple[int, int]:
        low = not any(self.kernel[1] % taps == 0 for taps in (7, 5))
        return LOW_SYNTHESIS_TILE if low else SYNTHESIS_TILE

    def tiles(self, tile: tuple[int, int]) -> int:
        """Blocks of code pixels."""
        images, *sides = self.image
        return images * math.prod(-(-side // part) for side, part in zip(sides, tile, strict=True))

    def halo(self, tile: tuple[int, int]) -> float:
        """Bytes of signal under all blocks: t pixels in a row meet (t - 1) stride + kernel."""
        strides = (1, self.stride[1]) if self.code_size[0] == 1 else self.stride
        extents = [
            (side - 1) * stride + kernel for side, stride, kernel in zip(tile, strides, self.kernel, strict=True)
        ]
        return VALUE * self.tiles(tile) * self.channels * math.prod(extents)

    @property
    def partials(self) -> int:
        """Blocks that write sums of their own of a weight's gradient."""
        return min(PARTIALS, self.tiles(CORRELATION_TILE))

    @property
    def block_sums(self) -> float:
        """Bytes of these sums, written and read again, and of the gradient."""
        slices = math.ceil(self.pixels * self.slabs / GRADIENT_SLICE)
        return (2 * self.partials * slices + 1) * self.weight

    @property
    def pieces(self) -> float:
        """Bytes of the unreduced tiles of a synthesis."""
        return self.halo(self.synthesis_tile)


def shape_of(case: Case, density: float) -> Shape:
    """A case with codes of a mean density; 1-D signals are pictures of one row, matrices have a pixel for each row."""
    if not case.spatial:
        return Shape(case.batch, case.channels, case.atoms, (1, 1), (1, 1), (1, 1), (1, 1), density, spatial=False)
    ahead = (1,) * (2 - len(case.spatial))
    size, padding = ahead + case.spatial, (case.kernel - 1) // 2
    code = ahead + tuple((n + 2 * padding - case.kernel) // case.stride + 1 for n in case.spatial)
    kernel, stride = (ahead + (value,) * len(case.spatial) for value in (case.kernel, case.stride))
    return Shape(case.batch, case.channels, case.atoms, size, kernel, stride, code, density)


@dataclass(frozen=True)
class Work:
    """What a kernel moves and computes."""

    bytes: float
    operations: float = 0
    shared: float = 0
    instructions: float = 0

    def limits(self, device: Device) -> dict[str, float]:
        """Seconds by what they are spent on."""
        return {
            "memory": self.bytes / device.bandwidth,
            "fp32": self.operations / device.fp32,
            "shared": self.shared / device.shared,
            "issue": self.instructions / device.issue,
        }

    def seconds(self, device: Device) -> float:
        return max(self.limits(device).values())

    def bound(self, device: Device) -> str:
        """What it waits for."""
        limits = self.limits(device)
        return max(limits, key=limits.__getitem__)


def sparse(shape: Shape, moved: float) -> Work:
    """A product that visits non-zeros alone, and reads a weight (or a sum) from shared memory for each."""
    products = shape.non_zeros * shape.products
    return Work(moved, 2 * products, VALUE * products, SPARSE_INSTRUCTIONS * products)


def dense(shape: Shape, moved: float) -> Work:
    """A product with every atom, and what follows at each pixel for each atom."""
    products, atoms = shape.pixels * shape.atoms * shape.products, shape.pixels * shape.atoms
    instructions = ANALYSIS_INSTRUCTIONS * products + EPILOGUE_INSTRUCTIONS * atoms
    return Work(moved, 2 * products + 4 * atoms, 0, instructions)


# Kernels of packed codes; synthesis blocks write what they add to the signal, with the border that neighbours meet too.
KERNELS: dict[str, Callable[[Shape], Work]] = {
    # S_D x, or S_W gu: a packed code in, a tile of signal for each block out
    "synthesis": lambda s: sparse(s, s.packed + s.pieces + s.weight),
    # r = y - sum of tiles; the gradient of the residual has no y
    "combine": lambda s: Work(s.pieces + 2 * s.signal, (s.pieces + s.signal) / VALUE),
    # T(x + A_W r): residual and x in, the next code out
    "analysis": lambda s: dense(s, s.halo(ANALYSIS_TILE) + 2 * s.packed + s.weight),
    # dW = corr(r, gu), dtheta: r, gu and the signs of x in; sums of each block out, and in again to be added up
    "correlation with r": lambda s: sparse(s, s.halo(CORRELATION_TILE) + s.packed + s.values + s.block_sums),
    # dD = -corr(gr, x): gr and x in; likewise
    "correlation with x": lambda s: sparse(s, s.halo(CORRELATION_TILE) + s.packed + s.block_sums),
    # gu - A_D gr where x was not zero: gr, gu and the mask of x in, values out
    "select": lambda s: dense(s, s.halo(ANALYSIS_TILE) + s.packed + s.masks + s.values + s.weight),
    # a dense code, once a call: the result, or its gradient on the support
    "unpack": lambda s: Work(s.packed + s.code, 0, 0, s.code / VALUE),
    "pack": lambda s: Work(s.packed + s.code, 0, 0, s.code / VALUE),
}

# Bytes of a later step on packed codes to and from memory, where a slice stays in the L2 cache; for inference: none.
FROM_MEMORY: dict[str, Callable[[Shape], float]] = {
    # the next code and the residual to the tape
    "forward": lambda s: s.packed + s.signal,
    # both from the tape; blocks' sums are as large as some caches
    "backward": lambda s: s.packed + s.signal + 2 * s.block_sums,
}

# Wide dictionaries and matrices: dense codes, products by the library, one fused pass around them.
WIDE: dict[str, Callable[[Shape], Work]] = {
    "library synthesis": lambda s: library(s, s.code + s.signal + s.weight),
    "residual": lambda s: Work(3 * s.signal, s.signal / VALUE),
    "library analysis": lambda s: library(s, s.code + s.signal + s.weight),
    "threshold": lambda s: Work(3 * s.code, 4 * s.code / VALUE),  # u and x in, the next code out
    "library correlation": lambda s: library(s, s.code + s.signal + s.weight),
    "threshold backward": lambda s: Work(3 * s.code, 2 * s.code / VALUE),  # g and x in, gu out
    "sum": lambda s: Work(3 * s.code, s.code / VALUE),  # gu - A_D gr
}


def library(shape: Shape, moved: float) -> Work:
    return Work(moved, 2 * shape.pixels * shape.atoms * shape.products)


def passes(codes: float, signals: float = 0) -> Callable[[Shape], Work]:
    """An elementwise operation that reads and writes so many dense codes and signals."""
    return lambda s: Work(codes * s.code + signals * s.signal, (codes * s.code + signals * s.signal) / VALUE / 2)


# Eager PyTorch, operation by operation. Forward has softshrink, which takes theta as a number; with a gradient it is
# sign(u) relu(|u| - theta), and autograd's operations are those of this formula.
EAGER: dict[str, Callable[[Shape], Work]] = WIDE | {
    "add": passes(3),  # x + A_W r
    "softshrink": passes(2),
    "sign, abs, minus, relu, times": passes(2 + 2 + 2 + 2 + 3),
    "their gradients": passes(
        3 + 3 + 1 + 3 + 3 + 5 + 3
    ),  # times (2), sign, relu, minus and its sum, abs, both together
    "signal's minus": passes(0, 2),
}


@dataclass(frozen=True)
class Schedule:
    """The kernels of the first step from zero, of a later one, and of what a call does once besides."""

    table: dict[str, Callable[[Shape], Work]]
    first: tuple[str, ...]
    later: tuple[str, ...]
    once: tuple[str, ...] = ()

    def calls(self, iterations: int, from_zero: bool = True) -> Iterator[str]:
        first = iterations > 0 and from_zero
        yield from self.first * first + self.later * (iterations - first) + self.once

    def works(self, shape: Shape, iterations: int, from_zero: bool = True) -> list[Work]:
        return [self.table[name](shape) for name in self.calls(iterations, from_zero)]


PACKED_SCHEDULES = {
    "forward": Schedule(KERNELS, ("analysis",), ("synthesis", "combine", "analysis"), ("unpack",)),
    "backward": Schedule(
        KERNELS,
        ("correlation with r", "synthesis", "combine"),
        ("correlation with r", "synthesis", "combine", "correlation with x", "select"),
        ("pack",),
    ),
}
WIDE_SCHEDULES = {
    "forward": Schedule(
        WIDE,
        ("library analysis", "threshold"),
        ("library synthesis", "residual", "library analysis", "threshold"),
    ),
    "backward": Schedule(
        WIDE,
        ("threshold backward", "library correlation", "library synthesis"),
        # the residual is made again
        (
            *("threshold backward", "library synthesis", "residual", "library correlation"),
            *("library synthesis", "library correlation", "library analysis", "sum"),
        ),
    ),
}
EAGER_SCHEDULES = {
    "forward": Schedule(
        EAGER,
        ("library analysis", "softshrink"),
        ("library synthesis", "residual", "library analysis", "add", "softshrink"),
    ),
    "forward with a tape": Schedule(
        EAGER,
        ("library analysis", "sign, abs, minus, relu, times"),
        ("library synthesis", "residual", "library analysis", "add", "sign, abs, minus, relu, times"),
    ),
    "backward": Schedule(
        EAGER,
        ("their gradients", "library correlation", "library synthesis"),
        (
            *("their gradients", "library correlation", "library synthesis", "signal's minus"),
            *("library correlation", "library analysis", "add"),
        ),
    ),
}


def schedules(shape: Shape) -> dict[str, Schedule]:
    return WIDE_SCHEDULES if shape.wide else PACKED_SCHEDULES


def directions(mode: str) -> tuple[str, ...]:
    return ("forward", "backward") if mode == "training" else ("forward",)


def predict(
    case: Case, mean_density: float, device: Device, *, mode: str, iterations: int, from_zero: bool = True
) -> float:
    """Seconds of a call of the fused operator; ``mode`` as in benchmarks.contenders."""
    shape = shape_of(case, mean_density)
    works = [w for name in directions(mode) for w in schedules(shape)[name].works(shape, iterations, from_zero)]
    return sum(work.seconds(device) for work in works)


def predict_eager(
    case: Case, mean_density: float, device: Device, *, mode: str, iterations: int, from_zero: bool = True
) -> float:
    """The same for eager PyTorch."""
    shape, tape = shape_of(case, mean_density), mode == "training"
    names = ("forward with a tape", "backward") if tape else ("forward",)
    works = [work for name in names for work in EAGER_SCHEDULES[name].works(shape, iterations, from_zero)]
    return sum(work.seconds(device) for work in works)


def packed_minimum(shape: Shape, direction: str) -> float:
    """Bytes of a step if every mask, non-zero and signal were read or written once.

    Forward: x in, the next code out, y in. Backward: both supports, x and gu in, the gradient of x out, r in, dy out.
    """
    if direction == "forward":
        return 2 * shape.least + shape.signal
    return 2 * shape.least + VALUE * shape.non_zeros + 2 * shape.signal


def device_named(name: str) -> Device | None:
    """The limits of a GPU as torch names it; None when its datasheet is not here."""
    return next((device for end, device in NAMES.items() if name.endswith(end)), None)


def microseconds(work: Work, device: Device) -> str:
    return f"{work.seconds(device) * 1e6:9.1f} {work.bound(device):7}"


def report(
    cases: Sequence[Case] = tuple(CASES.values()), densities: Sequence[float] = (0.1,), iterations: int = 10
) -> list[str]:
    """The lines that `python -m benchmarks --roofline` prints."""
    lines = [
        "PREDICTIONS, NOT MEASUREMENTS: bytes, operations and times that follow from shapes and datasheets alone, for",
        "kernels as they are written; none has run. A time in microseconds is the largest of memory, fp32, shared",
        "memory and instruction issue, whose name stands beside it; no launches, no idle multiprocessors, no caches.",
        "From memory, sliced: bytes that are left for memory if what a slice of the batch keeps stays in the L2 cache,",
        "in a step that writes or reads a tape (benchmarks/roofline.py).",
        *("Limits of " + limit for limit in map(limits_of, DEVICES.values())),
    ]
    for case in cases:
        for density in densities:
            lines += ["", *case_lines(case, density, iterations)]
    return [*(line.rstrip() for line in lines), "", "All of the above are predictions, not measurements."]


def limits_of(device: Device) -> str:
    return (
        f"{device.name}: {device.bandwidth / 1e9:.0f} GB/s, {device.fp32 / 1e12:.1f} TFLOP/s fp32, "
        f"{device.shared / 1e12:.1f} TB/s shared, {device.issue / 1e12:.1f} T instructions/s of threads"
    )


def bytes_line(label: str, moved: float, shape: Shape) -> str:
    return f"    {label:33}{moved / 1e6:9.2f}{moved / shape.pixels:10.1f}{'':11}" + "".join(
        f"{moved / device.bandwidth * 1e6:9.1f} memory " for device in DEVICES.values()
    )


def case_lines(case: Case, density: float, iterations: int) -> list[str]:
    """A case: its kernels, the sums of a step beside the packed minimum, and whole calls beside eager's."""
    mean = min(1.0, MEAN * density)
    shape = shape_of(case, mean)
    found = schedules(shape)
    kind = "library products and fused thresholds" if shape.wide else "packed codes"
    lines = [
        f"{case.name}: density {density:g} of the last code, {mean:.3g} in the mean; {kind}; prediction",
        f"  {'a step':35}{'MB':>9}{'bytes/px':>10}{'MFLOP':>10}" + "".join(f"{key + ', us':>18}" for key in DEVICES),
    ]
    for direction, schedule in found.items():
        for name, count in Counter([*schedule.later, *schedule.once]).items():
            work = schedule.table[name](shape)
            often = " (once)" if name in schedule.once else f" ({count} times)" if count > 1 else ""
            label = f"{direction} {name}{often}"
            lines.append(
                f"  {label:35}{work.bytes / 1e6:9.2f}{work.bytes / shape.pixels:10.1f}{work.operations / 1e6:10.1f} "
                + "".join(microseconds(work, device) for device in DEVICES.values())
            )
        works = [schedule.table[name](shape) for name in schedule.later]
        moved, least = sum(work.bytes for work in works), packed_minimum(shape, direction)
        lines.append(
            f"  {direction + ', all':35}{moved / 1e6:9.2f}{moved / shape.pixels:10.1f}"
            f"{sum(work.operations for work in works) / 1e6:10.1f} "
            + "".join(f"{sum(w.seconds(device) for w in works) * 1e6:9.1f}{'':8}" for device in DEVICES.values())
        )
        lines.append(bytes_line("packed minimum", least, shape) + f" {moved / least:.2f} times its bytes")
        if not shape.wide:
            left = FROM_MEMORY[direction](shape)
            lines.append(bytes_line("from memory, sliced", left, shape) + f" {left / least:.2f} times those")
    for mode in ("forward", "training"):
        options = {"mode": mode, "iterations": iterations}
        ours = [predict(case, mean, device, **options) * 1e6 for device in DEVICES.values()]
        eager = [predict_eager(case, mean, device, **options) * 1e6 for device in DEVICES.values()]
        lines.append(f"  {f'{iterations} steps, {mode}':64} " + "".join(f"{value:9.1f}{'':8}" for value in ours))
        lines.append(f"  {'  eager':64} " + "".join(f"{value:9.1f}{'':8}" for value in eager))
        ratios = [theirs / mine for theirs, mine in zip(eager, ours, strict=True)]
        lines.append(f"  {'  eager / fused':64} " + "".join(f"{value:9.2f}{'':8}" for value in ratios))
    return lines
