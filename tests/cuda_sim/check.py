"""Runs the float32 kernels of a library built from kernels.cpp and compares them with NumPy in float64.

    python check.py LIBRARY

Each case runs under several orders of blocks and threads, which have to give identical bits. Ends with status 1 at the
first complaint: of the comparison, of the executor, or of the sanitizer that the library was built with. It needs no
torch, so that it can start quickly under the sanitizer.
"""

import ctypes
import sys

import numpy as np

SEEDS = (1, 2, 3)

# outer, channels, inner, elements of a task in each channel, blocks
CASES = [
    (3, 5, 41, 1, 100),  # planes that share blocks of threads; a task to each
    (2, 3, 700, 300, 2),  # several tasks a channel, several tasks a block
    (1, 1, 769, 1, 3),  # one run of memory
    (100, 33, 1, 40, 100),  # channels are neighbours: a full tile of them and one with a single channel
    (67, 3, 1, 1, 2),
    (1, 2, 1, 1, 1),
    (0, 4, 3, 1, 1),  # empty
    (2, 0, 3, 1, 1),
]


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Library:
    """The functions of kernels.cpp; integers, floats and arrays go as they are, a complaint ends the program."""

    def __init__(self, path: str):
        self.functions = ctypes.CDLL(path)
        self.functions.seed.argtypes = [ctypes.c_uint64]

    def seed(self, value: int) -> None:
        self.functions.seed(value)

    def call(self, name: str, *arguments) -> None:
        convert = {int: ctypes.c_int64, float: ctypes.c_double, np.ndarray: pointer}
        function = getattr(self.functions, name)
        function.restype = ctypes.c_char_p
        complaint = function(*(convert[type(a)](a) for a in arguments)).decode()
        if complaint:
            sys.exit(f"{name}: {complaint}")


def expect(name: str, case: tuple, out: np.ndarray, reference: np.ndarray, tolerance: float) -> None:
    error = np.abs(out - reference).max(initial=0)
    if not error <= tolerance:
        sys.exit(f"{name} {case}: differs from the reference by {error}")


def same_bits(name: str, case: tuple, results: list[list[np.ndarray]]) -> None:
    if any(a.tobytes() != b.tobytes() for other in results[1:] for a, b in zip(results[0], other, strict=True)):
        sys.exit(f"{name} {case}: results vary with the order of threads")


def unwritten(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def check_threshold(library: Library, random: np.random.Generator, case: tuple, per_channel: bool) -> None:
    shape = case[:3]
    u, residual, grad = (random.standard_normal(shape, np.float32) for _ in range(3))
    theta = random.random(shape[1] if per_channel else 1, np.float32)
    bias = random.standard_normal(shape[1], np.float32)
    total = u.astype(float) + bias[:, None] + residual
    codes = np.sign(total) * np.maximum(np.abs(total) - theta.astype(float)[:, None], 0)

    results = []
    for seed in SEEDS:
        library.seed(seed)
        out, grad_u = unwritten(*shape), unwritten(*shape)
        grad_theta, grad_bias = unwritten(theta.size), unwritten(bias.size)
        library.call("threshold", *case, u, theta, theta.size, bias, residual, out)
        library.call("threshold_backward", *case, grad, out, theta, theta.size, grad_u, grad_theta, grad_bias)
        results.append([out, grad_u, grad_theta, grad_bias])

    same_bits("threshold", case, results)
    expect("threshold", case, out, codes, 1e-6)
    expected_u = np.where(out != 0, grad, 0).astype(float)
    terms = -np.sign(out) * expected_u
    expect("grad_u", case, grad_u, expected_u, 0)
    expect("grad_bias", case, grad_bias, expected_u.sum((0, 2)), 1e-4)
    expect("grad_theta", case, grad_theta, terms.sum((0, 2)) if per_channel else terms.sum(), 1e-4)


def check_penalty(library: Library, random: np.random.Generator, size: int, blocks: int) -> None:
    case, alpha = (size, blocks), 0.5
    x = random.standard_normal(size, np.float32)
    x[::3] = 0
    x[-1:] = 7  # the last one counts
    grad = np.array([0.3], np.float32)

    results = []
    for seed in SEEDS:
        library.seed(seed)
        norm, count, grad_x = unwritten(1), np.array([-1]), unwritten(size)
        library.call("l1_norm", *case, x, alpha, norm, count)
        library.call("l1_norm_backward", *case, grad, x, grad_x)
        results.append([norm, count, grad_x])

    same_bits("l1_norm", case, results)
    expect("l1_norm", case, norm, np.abs(x.astype(float)).sum(), 1e-3)
    expect("count", case, count, (np.abs(x) > alpha).sum(), 0)
    expect("grad_x", case, grad_x, grad * np.sign(x), 0)


def main() -> None:
    library, random = Library(sys.argv[1]), np.random.default_rng(0)
    for case in CASES:
        for per_channel in (False, True):
            check_threshold(library, random, case, per_channel)
    for size, blocks in ((1, 1), (255, 1), (777, 2), (1025, 3), (0, 0)):
        check_penalty(library, random, size, blocks)
    print("every case passed")


if __name__ == "__main__":
    main()
