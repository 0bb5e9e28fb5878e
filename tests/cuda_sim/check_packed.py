"""Runs the kernels of a library built from packed_kernels.cpp and compares them with NumPy in float64, as check.py.

python check_packed.py LIBRARY
"""

import sys

import numpy as np
from check import Library, expect, same_bits, unwritten

SEEDS = (1, 2)

# images, channels, atoms, height, width; density of the code
CASES = [
    ((1, 1, 5, 3, 8), 1.0),  # everything present, up to the last byte of the room
    ((1, 2, 66, 9, 37), 0.1),  # two slabs, tiles of 8 x 32 with neighbours, two passes of kernel rows
]


def patches(plane: np.ndarray) -> np.ndarray:
    """(N, C, H, W) to (N, C, 3, 3, H, W): what each tap of a 3 x 3 kernel meets."""
    padded = np.pad(plane, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = plane.shape[2:]
    rows = [[padded[:, :, i : i + height, j : j + width] for j in range(3)] for i in range(3)]
    return np.stack([np.stack(row, 2) for row in rows], 2)


def synthesis(code: np.ndarray, dictionary: np.ndarray) -> np.ndarray:
    return np.einsum("nmijhw,mcij->nchw", patches(code), dictionary[:, :, ::-1, ::-1])


def check(library: Library, random: np.random.Generator, case: tuple, density: float) -> None:
    images, channels, atoms, height, width = case
    y, before = (random.standard_normal((images, channels, height, width), np.float32) for _ in range(2))
    x = random.standard_normal((images, atoms, height, width), np.float32)
    x *= random.random(x.shape) < density
    dictionary, analysis = (random.standard_normal((atoms, channels, 3, 3), np.float32) / 3 for _ in range(2))
    theta = random.random(atoms, np.float32)

    residual = y - 1.5 * synthesis(x.astype(float), dictionary.astype(float)) + 0.5 * before
    u = x + np.einsum("ncijhw,mcij->nmhw", patches(residual), analysis)
    codes = np.sign(u) * np.maximum(np.abs(u) - theta[:, None, None], 0)
    gradient = np.einsum("ncijhw,nmhw->mcij", patches(y.astype(float)), x.astype(float))
    results = []
    for seed in SEEDS:
        library.seed(seed)
        out, partials = unwritten(*x.shape), unwritten(2, *dictionary.shape)
        library.call("step", *case, y, before, x, dictionary, analysis, theta, out)
        library.call("correlate", *case, y, x, partials)
        results.append([out, partials])
    same_bits("step", case, results)
    expect("step", case, out, codes, 1e-4)
    expect("correlate", case, partials.astype(float).sum(0), gradient, 1e-4)


def main() -> None:
    library, random = Library(sys.argv[1]), np.random.default_rng(0)
    for case, density in CASES:
        check(library, random, case, density)
    print("every case passed")


if __name__ == "__main__":
    main()
