"""Builds the executor of CUDA source (cuda_sim/README.md) and, with it, csrc/cuda/*.cu as operators for CPU tensors.

A library is built in one of three modes:

    fast      -O1, for results
    address   the address and undefined behaviour sanitizers; the process that loads it needs LD_PRELOAD (`environment`)
    race      -fsanitize=thread when compiling only, its hooks being those of cuda_sim/race_checker.cpp

The fixture `ops` has the operators of the fast library, or of the one that DSC_CUDA_SIM_LIBRARY names. By hand:

    python tests/cuda_sim_build.py race -k "soft and not float16"

builds and runs the tests of tests/test_cuda_*.py that are marked `every_mode`, here those that -k selects.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SIM = HERE / "cuda_sim"
CSRC = HERE.parent / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = "g++"

MODES = {
    "fast": ["-O1"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "race": ["-O1", "-fsanitize=thread"],
}
# -fno-gnu-unique: a static variable of an inline function is one library's, not one for all that Python loads.
COMMON = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas"]
EXECUTOR = ["executor", "atomics", "host_api", "symbols", "tensor_core"]
# Gradients in slices that a test's batch has more than one of.
TORCH_FLAGS = [
    "-DDSC_GRADIENT_PIXELS=500",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-isystem{TORCH / 'include'}",
]


def obstacle() -> str | None:
    """Why the executor cannot be built here, if it cannot."""
    if not sys.platform.startswith("linux"):
        return "the executor of CUDA source needs Linux"
    if shutil.which(COMPILER) is None:
        return f"the executor of CUDA source needs {COMPILER}, which is not on PATH"
    return None


def sanitizer(library: str = "libasan.so") -> str | None:
    """The address sanitizer's library, which a process has to load before one of that mode."""
    found = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def environment(mode: str) -> dict[str, str]:
    """Of a process that loads a library of this mode."""
    if mode != "address":
        return dict(os.environ)
    # torch throws exceptions: their library has to be there before the sanitizer's replaces parts of it.
    preload = f"{sanitizer()} {sanitizer('libstdc++.so.6')}"
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


def run(command: list) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr[-8000:]}"


class Builder:
    """Compiles into a folder, by two jobs at a time; every method returns a future at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.compiling = concurrent.futures.ThreadPoolExecutor(2)
        self.linking = concurrent.futures.ThreadPoolExecutor(8)  # they mostly wait for objects
        self.objects: dict[tuple, concurrent.futures.Future] = {}
        self.runs: dict[str, concurrent.futures.Future] = {}

    def close(self) -> None:
        self.linking.shutdown(cancel_futures=True)
        self.compiling.shutdown(cancel_futures=True)

    def object(self, source: Path, *flags, csrc: Path = CSRC) -> concurrent.futures.Future:
        key = (source, flags, csrc)
        if key not in self.objects:
            out = self.folder / f"{len(self.objects)}_{source.stem}.o"
            command = [COMPILER, "-c", *COMMON, f"-I{csrc}", f"-I{SIM}", *flags, "-x", "c++", source, "-o", out]
            # A flag may be a header that is still being compiled, by the other of the two jobs.
            done = lambda: [f.result() if isinstance(f, concurrent.futures.Future) else f for f in command]  # noqa: E731
            self.objects[key] = self.compiling.submit(lambda: run(done()) or out)
        return self.objects[key]

    def executor(self, mode: str) -> list[concurrent.futures.Future]:
        """Its own objects, without the sanitizer of the mode: the kernels are watched, not it."""
        names = [*EXECUTOR, "race_checker"] if mode == "race" else EXECUTOR
        return [self.object(SIM / f"{name}.cpp", "-O2") for name in names]

    def link(self, name: str, mode: str | None, objects: list[concurrent.futures.Future], *flags: str):
        """With the executor, unless the mode is None."""
        out = self.folder / name
        # The executor first: of inline functions that several objects have, the linker takes the first, which is not
        # watched. -Bsymbolic: a name that the library and PyTorch have is for the library its own.
        objects = [*(self.executor(mode) if mode else []), *objects]
        flags = ["-Wl,-Bsymbolic", *(flag for flag in MODES.get(mode, []) if "address" in flag), *flags]
        command = lambda: [COMPILER, *(o.result() for o in objects), *flags, "-o", out]  # noqa: E731
        return self.linking.submit(lambda: run(command()) or out)

    def torch_headers(self, flags: list[str]) -> concurrent.futures.Future:
        """A header to include first, compiled: torch's headers take longer than a kernel."""
        key = ("operators.h", *flags)
        if key not in self.objects:
            header = self.folder / f"headers_{len(self.objects)}.h"
            header.write_text(f'#include "{SIM / "operators.h"}"\n', encoding="utf-8")
            command = [COMPILER, *COMMON, f"-I{SIM}", *flags, "-x", "c++-header", header, "-o", f"{header}.gch"]
            self.objects[key] = self.compiling.submit(lambda: run(command) or header)
        return self.objects[key]

    def operators(self, mode: str, csrc: Path = CSRC, files: list[str] | None = None) -> concurrent.futures.Future:
        """The library of the operators of csrc/cuda/*.cu, or of some of the files."""
        flags = [*MODES[mode], *TORCH_FLAGS]
        flags += ["-include", self.torch_headers(flags)]
        sources = [csrc / "cuda" / name for name in files] if files else (csrc / "cuda").glob("*.cu")
        sources = sorted(sources, key=lambda path: -path.stat().st_size)  # what takes longest comes first
        objects = [self.object(path, *flags, csrc=csrc) for path in sources]
        objects.append(self.object(SIM / "operators.cpp", "-O1", *TORCH_FLAGS))
        name = f"operators_{mode}.so" if csrc == CSRC else f"operators_{mode}_{len(self.objects)}.so"
        return self.link(name, mode, objects, "-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10")

    def tests(self, mode: str) -> concurrent.futures.Future:
        """run_tests of a slower mode, or run_property_tests; once, and beside whatever else is done."""
        if mode not in self.runs:
            library = self.operators(mode)
            run = run_property_tests if mode == "fast" else functools.partial(run_tests, mode)
            self.runs[mode] = self.linking.submit(lambda: run(library.result()))
        return self.runs[mode]


def schemas() -> list[str]:
    """The schemas in csrc/ops.cpp of the operators that csrc/cuda implements."""
    implemented = re.findall(r'\.impl\("(\w+)"', "".join(path.read_text() for path in (CSRC / "cuda").glob("*.cu")))
    definitions = re.findall(r'\.def\(\s*((?:"[^"]*"\s*)+)\)', (CSRC / "ops.cpp").read_text())
    joined = ["".join(re.findall(r'"([^"]*)"', definition)) for definition in definitions]
    return [schema for schema in joined if schema.split("(")[0] in implemented]


@contextlib.contextmanager
def new_tensors_filled():
    """torch.empty returns NaN. torch.use_deterministic_algorithms would do it too, but imports torch's compiler."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warn_only)


class Operators:
    """torch.ops.dsc_ops_cuda_sim, each call under another order of blocks and threads, with NaN in new tensors."""

    def __init__(self, path: Path):
        self.library = torch.library.Library("dsc_ops_cuda_sim", "DEF")
        for schema in schemas():
            self.library.define(schema)
        torch.ops.load_library(path)
        functions = ctypes.CDLL(str(path))
        self.set_seed = functions.cuda_sim_seed
        self.set_seed.argtypes = [ctypes.c_uint64]
        self.launches = functions.cuda_sim_launches
        self.launches.restype = ctypes.c_uint64
        self.use_device = functions.cuda_sim_use_device
        self.switches = functions.cuda_sim_switches
        self.switches.restype = ctypes.c_uint64
        self.seed = 0

    @contextlib.contextmanager
    def device(self, number: int):
        """Launches for a device as large as an H100 (0), or as small as can be (1)."""
        self.use_device(number)
        try:
            yield
        finally:
            self.use_device(0)

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.dsc_ops_cuda_sim, name)

        @functools.wraps(operator)
        def call(*arguments, **options):
            self.seed += 1
            self.set_seed(self.seed)
            with new_tensors_filled():
                return operator(*arguments, **options)

        return call


@contextlib.contextmanager
def in_place_of_cpu(ops: Operators):
    """dsc_ops' operators do on CPU tensors what they do on CUDA, with the kernels of `ops`."""
    from dsc_ops import _autograd, _composed, _on_cuda

    class Both:
        """torch.ops.dsc_ops; those of its operators that are CUDA kernels come from `ops`."""

        def __getattr__(self, name: str):
            return getattr(ops if name in kernels else torch.ops.dsc_ops, name)

    kernels = {schema.split("(")[0] for schema in schemas()}
    library = torch.library.Library("dsc_ops", "IMPL")
    before = _autograd.cuda_device, _on_cuda.ops, _composed.ops
    _autograd.cuda_device, _on_cuda.ops, _composed.ops = "cpu", Both(), Both()
    for name in kernels:
        library.impl(name, getattr(ops, name), "CPU", allow_override=True)
    _on_cuda.register(library, "CPU", allow_override=True)
    try:
        yield
    finally:
        _autograd.cuda_device, _on_cuda.ops, _composed.ops = before
        library._destroy()


@pytest.fixture(scope="session")
def cuda_sim(tmp_path_factory):
    """A Builder."""
    if reason := obstacle():
        pytest.skip(reason)
    builder = Builder(tmp_path_factory.mktemp("cuda_sim"))
    yield builder
    builder.close()


@pytest.fixture(scope="session")
def ops(request):
    if library := os.environ.get("DSC_CUDA_SIM_LIBRARY"):
        return Operators(Path(library))
    builder = request.getfixturevalue("cuda_sim")
    library = builder.operators("fast")
    chosen = {item.originalname for item in request.session.items if hasattr(item, "originalname")}
    if "test_operators_in_every_mode" in chosen:  # they take long, and there may be a second processor
        for mode in ("race", "address") if sanitizer() else ("race",):
            builder.tests(mode)
    if "test_property_tests_of_the_cpu_kernels" in chosen:
        builder.tests("fast")
    return Operators(library.result())


PROPERTY_TESTS = ("functional", "solvers", "operators")
# Bounds that are the luck of a few values; what has nothing to do with kernels, or takes thousands of iterations.
NO_PROPERTY_TESTS = ("shrink", "low_precision", "compile", "composition", "threads", "sklearn", "optimality")


def run_property_tests(library: Path) -> subprocess.CompletedProcess:
    """The tests of the CPU kernels through the public functions, with the CUDA kernels in their place."""
    files = [str(HERE / f"test_{name}.py") for name in PROPERTY_TESTS]
    chosen = " and ".join(f"not {name}" for name in NO_PROPERTY_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    variables = {**os.environ, "DSC_TEST_KERNELS": "cuda-sim", "DSC_CUDA_SIM_LIBRARY": str(library)}
    return subprocess.run([*command, *files], env=variables, cwd=HERE.parent, capture_output=True, text=True)


def run_tests(mode: str, library: Path, *arguments: str, capture_output: bool = True) -> subprocess.CompletedProcess:
    """The tests of every CUDA operator that are marked `every_mode`, in a process with this library."""
    files = sorted(map(str, HERE.glob("test_cuda_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-m", "every_mode"]
    variables = {**environment(mode), "DSC_CUDA_SIM_LIBRARY": str(library)}
    options = dict(env=variables, cwd=HERE.parent, capture_output=capture_output, text=True)
    return subprocess.run([*command, *files, *arguments], **options)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in MODES:
        sys.exit(f"{__doc__}\nThe first argument is one of {', '.join(MODES)}.")
    with tempfile.TemporaryDirectory() as folder:
        library = Builder(Path(folder)).operators(sys.argv[1]).result()
        return run_tests(sys.argv[1], library, *sys.argv[2:], capture_output=False).returncode


if __name__ == "__main__":
    sys.exit(main())
