"""The package around the operators: what is built, how it is chosen, and what it says when something is missing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsc_ops
from dsc_ops import _C, _library
from dsc_ops.__main__ import main

ROOT = Path(__file__).parents[1]
NAMESPACE = torch.ops.dsc_ops


@pytest.fixture(scope="module")
def build():
    """setup.py as a module; it runs setup() only as a script."""
    spec = importlib.util.spec_from_file_location("dsc_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)


def told(monkeypatch, capsys, *arguments):
    """What `python -m dsc_ops` prints."""
    monkeypatch.setattr(sys, "argv", ["dsc_ops", *arguments])
    main()
    return capsys.readouterr().out


def test_report_names_what_was_built_and_found(monkeypatch, capsys):
    text = told(monkeypatch, capsys)
    for fact in (_C.version, _C.compiler, torch.__version__, _C.torch_version, "CUDA kernels", "GPU", "threads"):
        assert fact in text


def test_json_report_is_the_information(monkeypatch, capsys):
    facts = json.loads(told(monkeypatch, capsys, "--json"))
    assert facts == _library.information()
    assert facts["torch"] == torch.__version__
    assert facts["cuda_loaded"] == (facts["cuda_reason"] == "")
    assert bool(facts["cuda_built"]) == bool(facts["cuda_architectures"])


def test_help_explains(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        told(monkeypatch, capsys, "--help")
    text = capsys.readouterr().out
    assert "what was built" in text and "DSC_OPS_CPU_CAPABILITY" in text


def test_version_has_one_source():
    assert f'version = "{_C.version}"' in (ROOT / "pyproject.toml").read_text()
    assert dsc_ops.__version__ == _C.version


def test_package_is_typed():
    assert Path(dsc_ops.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize("level", _C.cpu_capabilities())
def test_environment_chooses_the_cpu_kernels(level):
    run = python("-m", "dsc_ops", "--json", DSC_OPS_CPU_CAPABILITY=level)
    assert json.loads(run.stdout)["cpu_capability"] == level


def test_best_cpu_kernels_by_default():
    run = python("-m", "dsc_ops", "--json", DSC_OPS_CPU_CAPABILITY="")
    assert json.loads(run.stdout)["cpu_capability"] == _C.cpu_capabilities()[-1]


def test_unknown_cpu_kernels_are_refused_by_name():
    run = python("-c", "import dsc_ops", DSC_OPS_CPU_CAPABILITY="neon")
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: DSC_OPS_CPU_CAPABILITY is 'neon'")
    assert message.endswith(", ".join(_C.cpu_capabilities()))


@pytest.mark.supports("faults", "a torch that is too old is refused with both versions")
@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128", "2.1.0a0+git123"])
def test_old_torch_is_refused_with_both_versions(version):
    with pytest.raises(ImportError, match=re.escape(f"dsc_ops needs torch 2.10 or newer, found torch {version}")):
        _library.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "3.0.0.dev20270101"])
def test_new_torch_is_accepted(version):
    _library.check_torch(version)


@pytest.mark.supports(
    "faults", "a library for another machine, or damaged: one sentence with the reason and what to do"
)
def test_source_folder_without_the_library_says_so():
    run = python("-c", "import sys; sys.modules['dsc_ops._C'] = None; import dsc_ops")
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    folder = Path(dsc_ops.__file__).parent
    assert message.startswith(f"ImportError: dsc_ops: {folder} has no compiled library") and "pip install ." in message


@pytest.mark.supports(
    "faults", "missing or broken CUDA libraries, another CUDA major: `python -m dsc_ops` says which, the CPU works"
)
@pytest.mark.parametrize(
    ("built", "running", "reason"),
    [
        ("13.0", "13.0", ""),
        ("13.0", "13.2", ""),
        ("13.0", "12.8", "built with CUDA 13.0, this torch has CUDA 12.8"),
        ("13.0", None, "this torch is a build without CUDA"),
        ("", "13.0", "built without CUDA kernels"),
    ],
)
def test_reason_why_cuda_kernels_are_not_loaded(built, running, reason):
    said = _library.cuda_obstacle(built, running)
    assert reason in said and bool(reason) == bool(said)


def test_cuda_kernels_that_cannot_be_loaded_do_not_stop_the_import(monkeypatch):
    def fail(path):
        raise OSError("libcudart.so.13: cannot open shared object file\nmore lines")

    monkeypatch.setattr(_library, "cuda_obstacle", lambda built, running: "")
    monkeypatch.setattr(torch.ops, "load_library", fail)
    spec = importlib.util.spec_from_file_location("dsc_ops._cuda", __file__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert _library.load_cuda() == "the CUDA kernels cannot be loaded: libcudart.so.13: cannot open shared object file"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "missing" in _library.load_cuda()


def schemas():
    source = (ROOT / "csrc" / "ops.cpp").read_text()
    return re.findall(r'library\.def\(\s*"(\w+)\(', source)


# packed_* are what others do on CUDA, and there only.
@pytest.mark.parametrize("name", [name for name in schemas() if not name.startswith("packed_")])
def test_each_schema_is_registered_with_a_cpu_kernel(name):
    assert hasattr(NAMESPACE, name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsc_ops::{name}", "CPU")


def test_cuda_setting(build, capsys):
    never = pytest.fail
    assert build.decide_cuda("0", lambda: never("asked although CUDA was not wanted")) is False
    assert build.decide_cuda("1", lambda: "") is True
    assert build.decide_cuda(None, lambda: "") is True
    assert capsys.readouterr().err == ""
    assert build.decide_cuda(None, lambda: "there is no nvcc") is False
    assert capsys.readouterr().err == "dsc_ops: building without CUDA kernels: there is no nvcc\n"


def test_cuda_setting_fails_in_one_sentence(build):
    with pytest.raises(SystemExit, match="DSC_OPS_CUDA=1 asks for CUDA kernels, but there is no nvcc"):
        build.decide_cuda("1", lambda: "there is no nvcc")
    with pytest.raises(SystemExit, match="DSC_OPS_CUDA is 'yes'; it takes 0 .*, 1 .* or nothing"):
        build.decide_cuda("yes", lambda: "")


def test_architectures(build):
    assert build.architecture_flags("8.0") == ["-gencode=arch=compute_80,code=[sm_80]"]
    assert build.architecture_flags(" 9.0a;12.0+PTX 9.0") == [
        "-gencode=arch=compute_90,code=[sm_90]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]
    assert build.architecture_flags(build.ARCHITECTURES) == [
        "-gencode=arch=compute_80,code=[sm_80,sm_90]",
        "-gencode=arch=compute_100,code=[sm_100,sm_120,compute_100]",
    ]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST has 'Hopper'; it takes compute capabilities"):
        build.architecture_flags("Hopper")


@pytest.mark.parametrize(
    ("torch_cuda", "platform", "reason"),
    [("13.0", "darwin", "Linux only"), (None, "linux", "build without CUDA"), ("13.0", "linux", "nvcc was not found")],
)
def test_obstacles_to_cuda(build, monkeypatch, torch_cuda, platform, reason):
    monkeypatch.setattr(build.Cuda, "find_home", lambda self: "")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(sys, "platform", platform)
    assert reason in build.Cuda(torch, "c++").obstacle()


def test_compiler_that_cannot_compile_is_quoted(build):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler here")
    assert build.compile_error([compiler, "-c"], ".cpp", "int main() {}\n") == ""
    assert "does/not/exist.h" in build.compile_error([compiler, "-c"], ".cpp", "#include <does/not/exist.h>\n")
    assert "no-such-compiler" in build.compile_error(["no-such-compiler"], ".cpp", "")


def test_flags_keep_the_meaning_of_the_mathematics_and_of_the_machine():
    for name in ("setup.py", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text()
        for flag in ("-march=", "-ffast-math", "-Ofast", "use_fast_math", "-ftz"):
            assert flag not in text, f"{name} has {flag}"


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("readelf"), reason="needs readelf")
def test_library_depends_on_no_cuda():
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed and not [name for name in needed if re.search("cuda|cudart|nvidia", name)]
    assert not re.search("RPATH|RUNPATH", dynamic)
