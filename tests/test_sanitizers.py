"""lista and the convolutions under the address and undefined behaviour sanitizers.

The package is built once more into a temporary folder, the kernels of this machine's best instruction set level and
what calls them with the sanitizers, and a part of the tests runs on it. The same has to complain when a defect is
planted.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import dsc_ops
from dsc_ops import _C

HERE = Path(__file__).parent
ROOT = HERE.parent
TORCH = Path(torch.__file__).parent
# Not bounds and object-size: with them GCC 12 at -O1 reads v[0] for every v[i] of a vector, so that results are wrong;
# the address sanitizer sees what leaves its piece of memory.
# Accesses are checked by calls, which compiles in two thirds of the time.
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-sanitize=bounds,object-size",
    "--param=asan-instrumentation-with-call-threshold=0",
]
COMPILER = "g++"

# The host files whose memory and arithmetic are looked at; the others are only there to make the package complete.
SANITIZED = ["lista", "packed", "convolution", "dilated", "norm", "residual"]
# Compiling is what takes the time: tensors of half precision, whose kernels differ from those of float32 in how they
# load and store, are left out, but for bfloat16 where it has kernels of its own.
HALF = r"DSC_CPU_LEVEL::make_kernels<(bfloat16|float16)>\(\)"

# What runs: every plan, every kind of iteration, gradients one by one, damaged tapes, random geometries, convolutions,
# the passes of MSD-CSC, the block of Res-CSC.
TESTS = (
    "test_packed and ((every_plan and 0.1) or (every_kind and 0.1 and (copied or atoms)) or (negative and True)"
    " or (any_choice and fista and False and (strips or copied or atoms)) or (infinity and False)"
    " or (tape and not touched) or places or masks or byte or geometry)"
    " or test_lista_matches or gradients_asked_for or empty_batches or (test_convolutions_match and float32)"
    " or (test_passes and not dtype2 and not dtype3) or (res_csc_as_one_operator and 48)"
    " or (half_precision and 0.1 and avx512_bf16)"
)

FILES = ("packed", "functional", "csc")

# Each is one edit of csrc/cpu/packed.cpp, and what the sanitizers have to say about it.
DEFECTS = {
    "a plane too small": (
        "padded(images * plane_image + 2 * vector, vector)", "padded(images * plane_image / 2, vector)",
        "heap-buffer-overflow"),
    "a product too large": (
        "const int64_t products = g.patch()", "const int64_t products = (int64_t{1} << 62) * g.patch()",
        "signed integer overflow"),
}  # fmt: skip

CALL = """
import torch
from dsc_ops import functional
y, weight = torch.randn(1, 1, 14, 15), torch.randn(9, 1, 3, 3)
print(functional.lista(y, weight, weight / 9, 0.3, iterations=2).shape)
"""


def runtime() -> str:
    """The sanitizers' libraries, which Python has to load before torch; and that of exceptions, which they replace."""
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"{COMPILER} has no {name}")
        paths.append(found)
    return " ".join(paths)


def run(command: list, **options) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result.stdout


def setup_module_of_the_build():
    spec = importlib.util.spec_from_file_location("dsc_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Build:
    """A package folder with sanitized kernels, compiled by two jobs at a time."""

    def __init__(self, folder: Path):
        self.folder, self.setup = folder, setup_module_of_the_build()
        self.runtime = runtime()
        self.source = folder / "source"
        shutil.copytree(ROOT / "csrc", self.source / "csrc")
        text = (self.source / "csrc/cpu/simd_kernels.cpp").read_text()
        text, count = re.subn(HALF, "{}", text)
        assert count == 2, "simd_kernels.cpp has changed: leave out half precision anew"
        (self.source / "csrc/cpu/without_half.cpp").write_text(text)
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(Path(dsc_ops.__file__).parent, folder / "dsc_ops", ignore=ignore)
        shutil.copytree(HERE, folder / "tests", ignore=shutil.ignore_patterns("cuda_sim", "__pycache__"))
        available = len(_C.cpu_capabilities())  # slowest first, as in LEVELS
        self.level = list(self.setup.LEVELS)[:available][-1]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            started = [pool.submit(self.compile_level, self.level)]
            files = [*SANITIZED, *sorted(set(self.host_files()) - set(SANITIZED)), "ops"]
            started += [pool.submit(self.compile, name) for name in files]
            self.objects = [job.result() for job in started]
        self.link(self.objects)

    def host_files(self) -> list[str]:
        levels = ("simd_kernels", "without_half")
        return [path.stem for path in (self.source / "csrc/cpu").glob("*.cpp") if path.stem not in levels]

    def command(self, sanitized: bool) -> list[str]:
        python = sorted({f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")})
        flags = [flag for flag in [*self.setup.COMMON_FLAGS, *self.setup.CXX_FLAGS] if flag not in ("-O3", "-g0")]
        flags += [f"-I{TORCH / 'include'}", f"-DDSC_CPU_LEVELS={len(self.setup.LEVELS)}", "-fPIC", *python]
        return [COMPILER, "-c", *flags, *(["-O1", "-g1", *SANITIZE] if sanitized else ["-O0", "-g0"])]

    def compile(self, name: str) -> Path:
        out = self.folder / f"{name}.o"
        facts = ("VERSION", "TORCH_VERSION", "CUDA_VERSION", "CUDA_ARCHITECTURES", "COMPILER")
        defines = [f'-DDSC_OPS_{fact}=""' for fact in facts] if name == "ops" else []
        source = "csrc/ops.cpp" if name == "ops" else f"csrc/cpu/{name}.cpp"
        run([*self.command(name in SANITIZED), *defines, source, "-o", out], cwd=self.source)
        return out

    def compile_level(self, level: str) -> Path:
        out = self.folder / f"level_{level}.o"
        define = f"-DDSC_CPU_LEVEL={level}"
        command = [*self.command(True), *self.setup.LEVELS[level], define]
        source = "simd_kernels" if level == "avx512" and "avx512_bf16" in _C.cpu_capabilities() else "without_half"
        run([*command, f"csrc/cpu/{source}.cpp", "-o", out], cwd=self.source)
        return out

    def link(self, objects: list[Path]) -> None:
        # The other levels are not called: their names stand for that which is there.
        name = lambda level: f"_ZN3dsc3cpu{len('kernels_' + level)}kernels_{level}E"  # noqa: E731
        present = (self.level, "avx512_bf16") if self.level == "avx512" else (self.level,)  # in one object
        absent = [level for level in (*self.setup.LEVELS, "avx512_bf16") if level not in present]
        aliases = [f"-Wl,--defsym={name(level)}={name(self.level)}" for level in absent]
        library = self.folder / "dsc_ops" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        library.unlink(missing_ok=True)
        run([COMPILER, "-shared", *SANITIZE, *objects, *aliases, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", library])

    def python(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "LD_PRELOAD": self.runtime,
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(self.folder),
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder)

    def plant(self, old: str, new: str) -> None:
        """Another package in the same folder, with one edit of packed.cpp."""
        path = self.source / "csrc/cpu/packed.cpp"
        original = path.read_text()
        assert original.count(old) == 1, "packed.cpp has changed: plant the defect anew"
        path.write_text(original.replace(old, new))
        try:
            self.compile("packed")
            self.link(self.objects)
        finally:
            path.write_text(original)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("the sanitizers' runtime is loaded into Python in the way of Linux")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"the sanitized kernels need {COMPILER}, which is not on PATH")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("#include <Python.h>\n#include <concepts>\n")
    include = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    command = [
        COMPILER,
        "-std=c++20",
        "-shared",
        "-fPIC",
        *SANITIZE,
        *include,
        str(probe),
        "-o",
        str(folder / "probe.so"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{COMPILER} cannot build a sanitized library for Python: {result.stderr.strip()[:500]}")
    return Build(folder)


@pytest.mark.supports("fuzzing", "the machine's best CPU kernels under the address and undefined behaviour sanitizers")
def test_kernels_under_the_sanitizers(build):
    # Reports go to the process's own stderr, which pytest is to leave alone.
    pytest_options = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "--best-level", "-k", TESTS]
    result = build.python("-m", "pytest", *pytest_options, *(f"tests/test_{name}.py" for name in FILES))
    assert result.returncode == 0, (result.stdout[-4000:] + result.stderr)[-12000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 200


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_sanitizers_find_a_planted_defect(defect, build):
    old, new, complaint = DEFECTS[defect]
    build.plant(old, new)
    result = build.python("-c", CALL)
    assert result.returncode != 0 and complaint in result.stderr, result.stdout + result.stderr[-4000:]
