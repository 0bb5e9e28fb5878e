"""The named shapes that every timing refers to, and their problems: signals, dictionary, thresholds.

A density is reached as in training, by the size of theta, never by zeroing a code. Two settings differ in the signals:

    photographs   pieces of scikit-image's photographs: non-zeros cluster as they do in use, at edges and in texture,
                  smooth regions have none
    random        white Gaussian noise: there is no structure to follow, non-zeros lie at random places, equally many
                  everywhere

The atoms are random and of unit norm in both; a trained dictionary would give the same costs at the same supports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from dsc_ops import functional
from examples.data.photographs import TEST_PHOTOGRAPHS, TRAINING_PHOTOGRAPHS, photograph
from examples.networks import dct_atoms

DENSITIES = (0.02, 0.05, 0.1, 0.3)
SETTINGS = ("photographs", "random")
COLOUR_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


@dataclass(frozen=True)
class Case:
    """A shape: signals (batch, channels, *spatial), a dictionary (atoms, channels, kernel, ...) and a stride.

    ``dense`` has no spatial axis: its signals are the pixels of one long signal under kernels of one pixel, as in
    :class:`dsc_ops.LISTALinear`, so that one operator serves all cases.
    """

    name: str
    batch: int
    channels: int
    spatial: tuple[int, ...]
    atoms: int
    kernel: int
    stride: int
    why: str

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """(N, C, *spatial), as the operator gets it."""
        return (self.batch, self.channels, *self.spatial) if self.spatial else (1, self.channels, self.batch)

    @property
    def dictionary_shape(self) -> tuple[int, ...]:
        return (self.atoms, self.channels, *[self.kernel] * max(len(self.spatial), 1))

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": (self.kernel - 1) // 2}

    def scaled(self, batch: int) -> Case:
        """The same shape with another batch."""
        return replace(self, batch=batch)


CASES = {
    case.name: case
    for case in (
        Case("denoise-gray", 8, 1, (128, 128), 64, 7, 1, "convolutional sparse coding of images"),
        Case("denoise-rgb", 8, 3, (96, 96), 64, 7, 1, "the same in colour"),
        Case("stem-cifar", 32, 3, (32, 32), 64, 3, 1, "SDNet, CIFAR"),
        Case("stem-imagenet", 4, 3, (224, 224), 64, 7, 2, "SDNet, ImageNet"),
        Case("deep", 16, 64, (32, 32), 128, 3, 1, "inner layers of ML-CSC and Res-CSC"),
        Case("signal", 32, 1, (4096,), 64, 65, 1, "ECG-like signals"),
        Case("dense", 4096, 250, (), 500, 1, 1, "the LISTA-CP benchmark of the literature"),
    )
}


@dataclass(frozen=True)
class Problem:
    """The arguments of `lista` for one case: y, D, W = D / L for each iteration, theta (K, 1), and the first code.

    ``code`` is the last code, ``counts`` are the non-zeros of x_0, ..., x_K; a first code of None is zero.
    """

    case: Case
    signal: Tensor
    dictionary: Tensor
    analysis: Tensor
    theta: Tensor
    start: Tensor | None
    code: Tensor
    counts: tuple[int, ...]

    @property
    def density(self) -> float:
        """Of the last code, measured."""
        return self.counts[-1] / self.code.numel()

    @property
    def mean_density(self) -> float:
        """Of all codes x_1, ..., x_K: the first ones have more non-zeros than the last."""
        return sum(self.counts[1:]) / (len(self.counts) - 1) / self.code.numel()

    def one_step(self) -> Problem:
        """A single step that starts from the last code."""
        return solved(replace(self, analysis=self.analysis[:1], theta=self.theta[:1], start=self.code))

    def to(self, target: torch.dtype | torch.device | str) -> Problem:
        """The same numbers in another dtype or on another device."""
        tensors = {name: value.to(target) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def cut(self) -> Problem:
        """Two iterations on the corner of one signal: next to no work, to load the code that works on it."""
        corner = [slice(None, 2 * self.case.kernel + self.case.stride)] * (self.signal.dim() - 2)
        signal = self.signal[(slice(None, 1), slice(None), *corner)].contiguous()
        return solved(replace(self, signal=signal, analysis=self.analysis[:2], theta=self.theta[:2], start=None))

    def operations(self, mode: str) -> tuple[int, int]:
        """Multiplications and additions: of dense products, and of those that the non-zeros of each code call for.

        Forward a step is S_D(x) and A_W(r), where only the second is dense by nature. Backward has dW and S_W(gu), on
        the support of the new code, dD and dx, on that of the old one; a first code that was given has a dense dx.
        Products with a first code of zero count nowhere; atoms beyond the border count whole.
        """
        products = 2 * self.dictionary[0].numel()
        whole, steps = products * self.code.numel(), len(self.analysis)
        old, new = products * sum(self.counts[:-1]), products * sum(self.counts[1:])
        syntheses = steps - (self.start is None)
        dense, true = (steps + syntheses) * whole, steps * whole + old
        if mode == "training":
            dense += 2 * (steps + syntheses) * whole
            true += 2 * (old + new)
            if self.start is not None:
                true += whole - products * self.counts[0]
        return dense, true


@torch.no_grad()
def solved(task: Problem) -> Problem:
    """The problem with its code and the counts of all codes."""
    code, counts = task.start, [0 if task.start is None else int(task.start.count_nonzero())]
    for weight, theta in zip(task.analysis, task.theta, strict=True):
        options = {"iterations": 1, "x0": code, **task.case.geometry}
        code = functional.lista(task.signal, task.dictionary, weight, theta.reshape(()), **options)
        counts.append(int(code.count_nonzero()))
    return replace(task, code=code, counts=tuple(counts))


@lru_cache(maxsize=1)  # the rows of a table come one after the other with the same problem
def problem(case: Case, density: float, iterations: int, setting: str = "photographs", seed: int = 0) -> Problem:
    """A case with the threshold at which the code after ``iterations`` has about the density asked for."""
    generator = torch.Generator().manual_seed(seed)
    if setting == "photographs":
        signal = photograph_signal(case, generator)
    else:
        signal = torch.randn(case.signal_shape, generator=generator)
    atoms = torch.randn(case.dictionary_shape, generator=generator)
    dictionary = atoms / atoms.flatten(1).norm(dim=1).reshape(-1, *[1] * (atoms.dim() - 1))
    # One value of L for signals of any length: it has all but reached its limit on a few kernel extents.
    size = [min(length, 8 * case.kernel) for length in signal.shape[2:]]
    weight = dictionary / functional.lipschitz(dictionary, size, **case.geometry)
    analysis = weight.expand(iterations, *weight.shape).contiguous()
    theta = threshold_for(case, signal, dictionary, analysis, density)
    return solved(Problem(case, signal, dictionary, analysis, theta, None, signal, ()))


@torch.no_grad()
def threshold_for(case: Case, signal: Tensor, dictionary: Tensor, analysis: Tensor, density: float) -> Tensor:
    """theta (K, 1), equal for all iterations, of a density within 3 % of the one asked for; never quite zero."""

    def reached(level: float) -> float:
        theta = torch.full((len(analysis), 1), level)
        return float(functional.density(functional.lista(signal, dictionary, analysis, theta, **case.geometry), 0))

    high = float(functional.analysis(signal, analysis[0], **case.geometry).abs().max())
    low = level = 2e-4 * high  # far enough from zero for u / theta, as some write it
    found = reached(level)
    for _ in range(20):
        if abs(found - density) <= 0.03 * density or found < density and level == low:
            break
        level = (low + high) / 2
        found = reached(level)
        low, high = (level, high) if found > density else (low, level)
    return torch.full((len(analysis), 1), level)


def photograph_signal(case: Case, generator: torch.Generator) -> Tensor:
    """Signals of the case's shape cut from photographs, each with zero mean.

    Pictures are crops, 1-D signals are scan lines one after the other, dense signals are the pixels of small patches,
    and signals of many channels are what a first layer makes of a photograph: its thresholded products with cosines.
    """
    count = case.batch
    if not case.spatial:
        patches = torch.cat(list(crops(count, (10, case.channels // 10), generator)))
        return centred(patches.flatten(1)).t().unsqueeze(0).contiguous()
    if len(case.spatial) == 1:
        lines = [crop.flatten()[: case.spatial[0]] for crop in crops(count, (16, -(-case.spatial[0] // 16)), generator)]
        return centred(torch.stack(lines)).unsqueeze(1)
    pictures = torch.stack(list(crops(count, case.spatial, generator, colour=case.channels == 3)))
    if case.channels in (1, 3):
        return centred(pictures)
    atoms = dct_atoms(round(case.channels**0.5), 7)
    return functional.conv_soft_threshold(centred(pictures), atoms, 0.1, padding=3)


def crops(count: int, size: tuple[int, ...], generator: torch.Generator, *, colour: bool = False) -> Iterator[Tensor]:
    """Random crops (C, *size) of the photographs, taken in turn."""
    names = COLOUR_PHOTOGRAPHS if colour else TRAINING_PHOTOGRAPHS + TEST_PHOTOGRAPHS
    pictures = [photograph(name, colour=colour) for name in names[:count]]
    for index in range(count):
        picture = pictures[index % len(pictures)]
        top, left = (
            int(torch.randint(length - cut + 1, (), generator=generator))
            for length, cut in zip(picture.shape[1:], size, strict=True)
        )
        yield picture[:, top : top + size[0], left : left + size[1]]


def centred(signals: Tensor) -> Tensor:
    """Each signal less its mean, as one compact tensor."""
    return signals - signals.mean(dim=tuple(range(1, signals.dim())), keepdim=True)
