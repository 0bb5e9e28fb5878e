"""Build of the two shared objects; everything else about the package stands in pyproject.toml.

    dsc_ops._C      operator schemas, CPU kernels, pybind11 module; links no CUDA library, so any torch imports it
    dsc_ops._cuda   CUDA kernels; dsc_ops/_library.py loads it where the running torch has CUDA

Environment: DSC_OPS_CUDA (0 without, 1 with, unset: with CUDA kernels when they can be built), TORCH_CUDA_ARCH_LIST,
CXX, MAX_JOBS, and CUDA_HOME where the nvidia packages are not installed; SOURCE_DATE_EPOCH for the dates in an sdist.

torch.utils.cpp_extension is not used: it guesses CUDA_HOME from an nvcc on PATH, asks a GPU for its architecture and
compiles file after file where flags differ. The stable ABI needs only torch's headers and libraries, so one ninja file
does it all.
"""

import gzip
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
COMMON_FLAGS = ["-std=c++20", "-O3", "-Icsrc", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # stable ABI of torch 2.10
# NaN and infinity keep their meaning; only floating-point exception flags and errno, which nothing reads, are given up:
# they would keep thresholds from being vectorised.
CXX_FLAGS = ["-g0", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"]
NVCC_FLAGS = ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]

# simd_kernels.cpp is compiled once for each level. The slowest comes first, also in the link: of an inline function
# that several objects hold the linker keeps the first copy, which then every machine can run.
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mbmi", "-mbmi2", *LEVELS["avx2"]]
    LEVELS["avx512"] += ["-mprefer-vector-width=512"]

# torch exports copies of a few functions of the C++ library; the linker is to find them in the library itself, before.
CXX_LIBRARY = ["stdc++"] if sys.platform == "linux" else []
OBJECTS = Path("build", "objects")  # kept in the checkout: the next build compiles what has changed
EARLIEST_DATE = 315532800  # 1980, the first year that zip files know; sdists have this date without SOURCE_DATE_EPOCH


def decide_cuda(setting: str | None, obstacle: Callable[[], str]) -> bool:
    """Whether to build the CUDA kernels; obstacle() is what stands against it, empty when nothing does."""
    if setting not in (None, "", "0", "1"):
        sys.exit(
            f"dsc_ops: DSC_OPS_CUDA is {setting!r}; it takes 0 (without CUDA kernels), 1 (with CUDA kernels) "
            "or nothing (with CUDA kernels if they can be built)"
        )
    if setting == "0":
        return False
    reason = obstacle()
    if reason and setting == "1":
        sys.exit(f"dsc_ops: DSC_OPS_CUDA=1 asks for CUDA kernels, but {reason}")
    if reason:
        print(f"dsc_ops: building without CUDA kernels: {reason}", file=sys.stderr)
    return not reason


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list as TORCH_CUDA_ARCH_LIST has it, "8.0;9.0+PTX".

    Reading the source takes most of the time, so it is read once for the capabilities before 10.0 and once for those
    from there on, each time for the oldest, whose PTX is compiled for the others too. Apart from each other they need
    fewer registers. Capabilities with a letter, as 9.0a, have PTX that is theirs alone.
    """
    codes: dict[str, list[str]] = {}
    listed = []
    for name in re.split(r"[;\s]+", architectures.strip("; \t")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            sys.exit(
                f"dsc_ops: TORCH_CUDA_ARCH_LIST has {name!r}; it takes compute capabilities, as in {ARCHITECTURES}"
            )
        listed.append((int(match[1] + match[2]), match[3], bool(match[4])))
    for number, letter, ptx in sorted(listed):
        same = [n for n, other, _ in listed if not other and (n < 100) == (number < 100)]
        oldest = number if letter else min(same)
        group = codes.setdefault(f"{oldest}{letter}", [])
        group += [f"sm_{number}{letter}"] + [f"compute_{oldest}{letter}"] * ptx
    return [f"-gencode=arch=compute_{oldest},code=[{','.join(group)}]" for oldest, group in codes.items()]


def compile_error(command: list[str], suffix: str, program: str) -> str:
    """Why `command` cannot compile the program: the first error that it prints, empty when it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text(program)
        try:
            run = subprocess.run([*command, source, "-o", source.with_suffix(".o")], capture_output=True, text=True)
        except OSError as error:
            return str(error)
    lines = (run.stderr + run.stdout).strip().splitlines() or [f"exit status {run.returncode}"]
    return "" if run.returncode == 0 else next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


def ninja_file(folder: Path, edges: list[tuple[Path, Path, list[str]]]) -> str:
    """A ninja file that makes each (object, source, command)."""
    path = lambda name: re.sub(r"([ :$])", r"$\1", str(name))  # noqa: E731
    lines = [f"builddir = {path(folder)}", "rule compile", "  command = $compiler -MMD -MF $out.d -c $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $in -> $out"]
    for made, source, command in edges:
        lines += [
            f"build {path(made)}: compile {path(source)}",
            f"  compiler = {shlex.join(command).replace('$', '$$')}",
        ]
    return "\n".join(lines) + "\n"


class Cuda:
    """The CUDA compiler and what it links to, for the CUDA version of the torch that is built against."""

    def __init__(self, torch, cxx: str):
        self.torch = torch
        self.cxx = next(word for word in shlex.split(cxx) if Path(word).name not in ("ccache", "sccache"))
        self.version = torch.version.cuda or ""
        self.major = self.version.split(".")[0]
        self.architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        self.home = self.find_home()
        cudart = f":libcudart.so.{self.major}"  # the packages have no libcudart.so
        self.libraries = [*CXX_LIBRARY, "torch_cpu", "torch_cuda", cudart]
        self.library_dirs = [f"{folder_of(torch)}/lib", f"{self.home}/lib", f"{self.home}/lib64"]

    def find_home(self) -> str:
        """The folder of the nvidia packages, else CUDA_HOME; an nvcc on PATH may be of any version."""
        nvidia = importlib.util.find_spec("nvidia")
        homes = [f"{folder}/cu{self.major}" for folder in nvidia.submodule_search_locations] if nvidia else []
        homes.append(os.environ.get("CUDA_HOME", ""))
        return next((home for home in homes if home and Path(home, "bin", "nvcc").exists()), "")

    def command(self) -> list[str]:
        nvcc = [f"{self.home}/bin/nvcc", "-ccbin", shutil.which(self.cxx) or self.cxx, *COMMON_FLAGS, *NVCC_FLAGS]
        return nvcc + architecture_flags(self.architectures)

    def obstacle(self) -> str:
        if sys.platform != "linux":
            return "they are built on Linux only"
        if not self.version:
            return f"torch {self.torch.__version__} of the build environment is a build without CUDA"
        if not self.home:
            return "nvcc was not found: the package nvidia-cuda-nvcc is not installed and CUDA_HOME leads to none"
        link = ["-shared", "-cudart=none"]
        link += [f"-L{name}" for name in self.library_dirs] + [f"-l{name}" for name in self.libraries]
        program = f'static_assert(CUDART_VERSION / 1000 == {self.major}, "nvcc is not of the CUDA version of torch");\n'
        problem = compile_error([*self.command(), *link], ".cu", program + "__global__ void probe() {}\n")
        return f"nvcc cannot build a small program here: {problem}" if problem else ""


def folder_of(module) -> Path:
    return Path(module.__file__).parent


def link_to(target: Path, name: str) -> Path:
    """A name for a folder that is somewhere else the next time."""
    link = OBJECTS / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target.absolute(), target_is_directory=True)
    return link


def same_bytes(archive: Path, date: int) -> None:
    """Write a .tar.gz anew with nothing in it that depends on who packed it, when, and in which order."""
    unfinished = archive.with_name(archive.name + ".unfinished")
    with tarfile.open(archive) as old, open(unfinished, "wb") as file:
        with gzip.GzipFile("", "wb", 9, file, date) as packed, tarfile.open(fileobj=packed, mode="w") as new:
            for member in sorted(old, key=lambda member: member.name):
                member.mtime, member.uid, member.gid, member.uname, member.gname = date, 0, 0, "", ""
                member.mode, member.pax_headers = 0o755 if member.isdir() or member.mode & 0o100 else 0o644, {}
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
    unfinished.replace(archive)


class Sdist(sdist):
    def make_archive(self, *arguments, **options):
        made = super().make_archive(*arguments, **options)
        if made.endswith(".tar.gz"):
            same_bytes(Path(made), int(os.environ.get("SOURCE_DATE_EPOCH") or EARLIEST_DATE))
        return made


class Python(build_py):
    def run(self):
        if not self.editable_mode:  # what an earlier version left in the build folder would be packed into the wheel
            shutil.rmtree(Path(self.build_lib, "dsc_ops"), ignore_errors=True)
        super().run()


class Build(build_ext):
    def run(self):
        if sys.platform == "win32":
            sys.exit("dsc_ops: builds on Linux and macOS; on Windows use the Windows Subsystem for Linux")
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            sys.exit("dsc_ops: free-threaded Python is not supported yet: use the Python of this version with the GIL")
        # Python remembers the compiler that it was built with, which need not exist here.
        present = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
        os.environ.setdefault("CXX", present[0] if present else "c++")
        super().run()

    def build_extensions(self):
        missing = [name for name in ("torch", "pybind11", "ninja") if not importlib.util.find_spec(name)]
        if missing:
            sys.exit(
                f"dsc_ops: building needs {', '.join(missing)}: leave pip's build isolation on, or install it first"
            )
        import torch  # late, because metadata and sdist need none

        if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
            sys.exit(f"dsc_ops: building needs torch 2.10 or newer, this environment has {torch.__version__}")
        python = sorted({f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")})
        cxx = [*self.compiler.compiler_so_cxx, *COMMON_FLAGS, *CXX_FLAGS, *python]
        problem = compile_error([*cxx, "-c"], ".cpp", "#include <Python.h>\n#include <concepts>\n")
        if problem:
            sys.exit(f"dsc_ops: needs a C++20 compiler (GCC 10 or Clang 12, or newer) and Python's headers: {problem}")
        cuda = Cuda(torch, os.environ["CXX"])
        with_cuda = decide_cuda(os.environ.get("DSC_OPS_CUDA"), cuda.obstacle)
        self.compile(torch, cxx, cuda if with_cuda else None)
        super().build_extensions()  # the link

    def compile(self, torch, cxx: list[str], cuda: Cuda | None) -> None:
        """All objects of both extensions in one ninja run."""
        import pybind11

        # Build isolation has another folder for torch each time. By a name with its version the commands stay the same,
        # and what is left to do is what has changed. -isystem: dates of these headers do not count.
        headers = link_to(folder_of(torch), f"torch-{torch.__version__}")
        includes = [f"-DDSC_CPU_LEVELS={len(LEVELS)}", "-isystem", f"{headers}/include"]
        includes += ["-isystem", link_to(Path(pybind11.get_include()), f"pybind11-{pybind11.__version__}").as_posix()]
        cxx = [*cxx, *includes, f"-ffile-prefix-map={headers}/=torch/"]  # no path of this machine in the objects
        compiler = subprocess.check_output([*shlex.split(os.environ["CXX"]), "--version"], text=True).splitlines()[0]
        cxx.append(f'-DDSC_OPS_COMPILER="{compiler}"')  # another one compiles everything
        facts = {
            "VERSION": self.distribution.get_version(),
            "TORCH_VERSION": torch.__version__,
            "CUDA_VERSION": cuda.version if cuda else "",
            "CUDA_ARCHITECTURES": cuda.architectures if cuda else "",
        }
        facts = [f'-DDSC_OPS_{name}="{value}"' for name, value in facts.items()]  # ops.cpp alone tells them

        edges = []

        def add(source: Path, command: list[str], name: str) -> str:
            edges.append((OBJECTS / name, source, command))
            return str(OBJECTS / name)

        # ninja starts in this order: what takes longest comes first, so that nothing is left over for one processor
        library, kernels = self.extensions
        simd = Path("csrc/cpu/simd_kernels.cpp")
        level_of = lambda name: [*cxx, *LEVELS[name], f"-DDSC_CPU_LEVEL={name}"]  # noqa: E731
        levels = [add(simd, level_of(name), f"cpu/{name}.o") for name in reversed(LEVELS)]
        if cuda:
            cuda.home = link_to(Path(cuda.home), f"cuda-{cuda.version}")
            nvcc = [*cuda.command(), *includes, f"-Xcompiler=-ffile-prefix-map={headers}/=torch/"]
            files = sorted(Path("csrc/cuda").glob("*.cu"), reverse=True)
            kernels.depends = kernels.extra_objects = [add(file, nvcc, f"cuda/{file.stem}.o") for file in files]
            kernels.libraries, kernels.library_dirs = cuda.libraries, cuda.library_dirs
        else:
            self.extensions = [library]
            Path(self.get_ext_fullpath(kernels.name)).unlink(missing_ok=True)  # of an earlier build in this folder
        plain = [add(Path("csrc/ops.cpp"), [*cxx, *facts], "ops.o")]
        plain += [add(file, cxx, f"cpu/{file.stem}.o") for file in sorted(simd.parent.glob("*.cpp")) if file != simd]
        library.depends = library.extra_objects = plain + levels[::-1]  # in this order, see LEVELS
        library.libraries, library.library_dirs = [*CXX_LIBRARY, "torch_cpu"], [f"{folder_of(torch)}/lib"]

        ninja = OBJECTS / "build.ninja"
        ninja.write_text(ninja_file(OBJECTS, edges))
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([sys.executable, "-m", "ninja", "-f", ninja, *jobs]).returncode:
            sys.exit("dsc_ops: the build stopped at the first error above")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"dsc_ops.{name}", [], language="c++") for name in ("_C", "_cuda")],
        cmdclass={"build_ext": Build, "build_py": Python, "sdist": Sdist},
    )
