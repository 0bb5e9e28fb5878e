"""The memory of large tapes (csrc/cpu/tape_memory.cpp), which is used again, and by one tape at a time."""

from __future__ import annotations

import sys
import threading
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsc_ops import functional

ops = torch.ops.dsc_ops
kept = pytest.mark.skipif(
    sys.platform != "linux" or tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 11),
    reason="tapes are torch's memory: they stay with the library on Linux, from torch 2.11 on",
)


def problem(size: int, iterations: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dictionary, analysis and theta of a lista with 64 atoms: a tape of over 512 size^2 bytes."""
    dictionary = torch.randn(64, 1, 3, 3) / 8
    return (
        torch.randn(1, 1, size, size),
        dictionary,
        dictionary.repeat(iterations, 1, 1, 1, 1),
        torch.rand(iterations, 64),
    )


def tape_of(y: Tensor, dictionary: Tensor, analysis: Tensor, theta: Tensor) -> Tensor:
    return ops.lista(y, dictionary, analysis, theta, None, [], [1, 1], [1, 1], [1, 1], 1, False, True)[1]


def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    return torch.autograd.grad(functional.lista(*leaves, padding=1).square().sum(), leaves)


@pytest.mark.supports(
    "memory", "a large tape's memory is used again, by one tape at a time (Linux, torch 2.11 or later)"
)
@kept
def test_a_freed_tape_leaves_its_memory_to_the_next_of_its_size_or_less():
    # What a tape does not use keeps what stood there before, unless the system was short of memory meanwhile.
    for size in (150, 140):
        found = []
        for _ in range(5):
            tape_of(*problem(150)).fill_(77)
            found.append(int((tape_of(*problem(size)) == 77).sum()))
        assert max(found) > 2**20


@kept
def test_what_is_kept_is_no_more_than_there_were_tapes_at_once():
    def mapped() -> int:  # bytes of address space
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * 4096

    gradients(*problem(200))
    before = mapped()
    for size in range(210, 410, 20):  # each too large for the block of the one before
        gradients(*problem(size))
    assert mapped() - before < 2.5 * tape_of(*problem(390)).numel()


@pytest.mark.supports(
    "memory", "a large tape's memory is used again, by one tape at a time (Linux, torch 2.11 or later)"
)
def test_tapes_that_live_at_once_have_memory_of_their_own():
    problems = [problem(size) for size in (150, 140, 150, 160)]
    for _ in range(3):  # in the second and third round there is memory from the one before
        tapes = [tape_of(*p) for p in problems]
        ranges = sorted((tape.data_ptr(), tape.data_ptr() + tape.numel()) for tape in tapes)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
        del tapes


def test_gradients_are_the_same_from_memory_that_was_used_before():
    problems = [problem(size) for size in (150, 140, 160)]
    alone = [gradients(*p) for p in problems]
    for tape in [tape_of(*p) for p in problems * 2]:
        tape.fill_(255)
    del tape
    leaves = [[argument.clone().requires_grad_() for argument in p] for p in problems]
    losses = [functional.lista(*leaf, padding=1).square().sum() for leaf in leaves]  # all tapes at once
    for loss, leaf, expected in zip(losses, leaves, alone, strict=True):
        for one, other in zip(torch.autograd.grad(loss, leaf), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_tapes_of_several_threads():
    problems, wrong = [problem(150 + 5 * i) for i in range(4)], []
    expected = [gradients(*p) for p in problems]

    def train(i: int) -> None:
        for _ in range(10):
            for one, other in zip(gradients(*problems[i]), expected[i], strict=True):
                if not torch.equal(one, other):
                    wrong.append(i)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
