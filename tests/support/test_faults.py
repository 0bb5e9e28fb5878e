"""Machines and installations that lack something: one clear sentence, and work on the CPU goes on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from network import Network, images

import dsc_ops
from dsc_ops import _C, _library, functional

HERE = Path(__file__).parent

# A step of training, in a process that has something missing.
STEP = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch, dsc_ops
from network import Network, images
torch.manual_seed(0)
model, y = Network(), images()
model(y).square().sum().backward()
print(dsc_ops._library._C.cpu_capability(), float(model.codes.dictionary.grad.double().norm()))
"""


@pytest.fixture(scope="module")
def expected() -> float:
    torch.manual_seed(0)
    model, y = Network(), images()
    model(y).square().sum().backward()
    return float(model.codes.dictionary.grad.double().norm())


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.supports(
    "faults", "a CPU without AVX2 (`DSC_OPS_CPU_CAPABILITY=default`): every layer trains, results agree"
)
@pytest.mark.supports("faults", "no writable home or cache folder: nothing of the library needs one")
def test_a_poor_machine(expected, tmp_path):
    """Without AVX2, and with a file where each folder should be."""
    file = tmp_path / "file"
    file.write_text("")
    names = ("HOME", "XDG_CACHE_HOME", "TMPDIR", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    names += ("TORCH_EXTENSIONS_DIR", "PYTHONPYCACHEPREFIX", "CUDA_CACHE_PATH", "PYTORCH_KERNEL_CACHE_PATH")
    environment = {name: str(file / "folder") for name in names} | {"DSC_OPS_CPU_CAPABILITY": "default"}
    run = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, env=os.environ | environment)
    assert run.returncode == 0, run.stderr[-2000:]
    level, norm = run.stdout.split()
    assert level == "default" and float(norm) == pytest.approx(expected, rel=1e-4)


@pytest.mark.supports("faults", "kernels that the machine cannot run are refused by name, with those that it can")
@pytest.mark.parametrize("level", ["avx512", "avx512_bf16", "AVX2", "sse", "../x", "\N{GREEK SMALL LETTER LAMDA}"])
def test_kernels_that_the_machine_cannot_run(level):
    if level in _C.cpu_capabilities():
        pytest.skip(f"this machine has {level}")
    have = ", ".join(_C.cpu_capabilities())
    with pytest.raises(
        ImportError, match=f"DSC_OPS_CPU_CAPABILITY is '{level}', which is not available; this .* has: {have}"
    ):
        _library.choose_cpu_capability(level)


# --- the installation -------------------------------------------------------------------------------------------------


# Imports the package in each folder in turn and prints what that says.
IMPORTS = """
import sys
import torch
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    try:
        import dsc_ops
        print("loaded")
    except ImportError as error:
        print(error)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dsc_ops"]:
        del sys.modules[name]
    sys.path.remove(folder)
"""


@pytest.mark.supports(
    "faults", "a library for another machine, or damaged: one sentence with the reason and what to do"
)
def test_a_library_that_cannot_be_loaded(tmp_path):
    name, content = Path(_C.__file__).name, Path(_C.__file__).read_bytes()
    damages = {
        "text": b"not a library",
        "cut off": content[:40],
        "another architecture": content[:18] + (0xF3).to_bytes(2, "little") + content[20:],  # e_machine of ELF: RISC-V
    }
    for damage, damaged in damages.items():
        package = tmp_path / damage / "dsc_ops"
        shutil.copytree(Path(dsc_ops.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        (package / name).write_bytes(damaged)
    folders = [str(tmp_path / damage) for damage in damages]
    run = subprocess.run([sys.executable, "-c", IMPORTS, *folders], capture_output=True, text=True, cwd=tmp_path)
    said = run.stdout.splitlines()
    assert len(said) == len(damages), run.stdout + run.stderr
    for line in said:
        assert line.startswith("dsc_ops: the compiled library cannot be loaded: ")
        assert name in line and "install the package again" in line


@pytest.mark.supports("threads", "free-threaded Python is refused when it is imported")
def test_free_threaded_python_is_refused():
    with pytest.raises(ImportError, match="does not support free-threaded Python, use the build with"):
        _library.check_interpreter(True)
    _library.check_interpreter(False)


@pytest.fixture
def pretend_cuda(monkeypatch, tmp_path):
    """As if both torch and this library were built with CUDA 13, and the file of the CUDA kernels were this."""

    def pretend(content: bytes | None) -> Path:
        file = tmp_path / "_cuda.so"
        if content is not None:
            file.write_bytes(content)
        spec = importlib.util.spec_from_file_location("dsc_ops._cuda", file)
        monkeypatch.setattr(_C, "cuda_version", "13.0")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if content is not None else None)
        return file

    return pretend


@pytest.mark.supports(
    "faults", "missing or broken CUDA libraries, another CUDA major: `python -m dsc_ops` says which, the CPU works"
)
@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_broken_cuda_kernels(content, pretend_cuda):
    file = pretend_cuda(content)
    reason = _library.load_cuda()
    assert "\n" not in reason
    if content is None:
        assert reason == "the file of the CUDA kernels is missing from this installation"
    else:
        assert reason.startswith("the CUDA kernels cannot be loaded: ") and str(file) in reason
    assert Network()(images()).isfinite().all()


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("g++"), reason="needs g++ on Linux")
def test_cuda_kernels_whose_libraries_are_missing(pretend_cuda, tmp_path):
    """What a user has whose CUDA runtime is gone: the loader's sentence names the library."""
    (tmp_path / "empty.cpp").write_text("int answer;")
    (tmp_path / "user.cpp").write_text("extern int answer; int* use() { return &answer; }")
    compiler = ["g++", "-shared", "-fPIC"]
    subprocess.run([*compiler, "empty.cpp", "-o", "libcudart_gone.so.13"], cwd=tmp_path, check=True)
    subprocess.run([*compiler, "user.cpp", "libcudart_gone.so.13", "-o", "real.so"], cwd=tmp_path, check=True)
    (tmp_path / "libcudart_gone.so.13").unlink()
    pretend_cuda((tmp_path / "real.so").read_bytes())
    assert "libcudart_gone.so.13: cannot open shared object file" in _library.load_cuda()


@pytest.mark.parametrize("running", ["12.8", "14.0", None])
def test_kernels_for_another_cuda(running, monkeypatch):
    monkeypatch.setattr(_C, "cuda_version", "13.0")
    monkeypatch.setattr(torch.version, "cuda", running)
    said = f"dsc_ops was built with CUDA 13.0, this torch has CUDA {running}"
    assert _library.load_cuda() == (said if running else "this torch is a build without CUDA")


@pytest.mark.supports("faults", "a tensor on a GPU without CUDA kernels: the reason, in one sentence")
def test_operators_without_cuda_kernels_say_why():
    """Called as the dispatcher calls the CUDA implementation; the tensors are on the CPU, where they are looked at."""
    if not _library.cuda_reason:
        pytest.skip("the CUDA kernels are loaded here")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    ops, u, theta = torch.ops.dsc_ops, torch.randn(2, 3), torch.tensor(0.1)
    for name, arguments in {
        "soft_threshold": (u, theta, None, None, False),
        "soft_threshold_backward": (u, u, theta, False),
        "shrink": (u, theta, "elu", False),
        "shrink_backward": (u, u, theta, "elu", False),
        "l1_norm": (u, 0.0),
        "l1_norm_backward": (theta, u),
    }.items():
        with pytest.raises(RuntimeError) as caught:
            getattr(ops, name).default.redispatch(cuda, *arguments)
        message = f"dsc_ops: {name} cannot run on a GPU: {_library.cuda_reason}; tensors on the CPU work"
        assert str(caught.value) == message
    assert torch.equal(functional.soft_threshold(u, 0.0), u)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.supports(
    "faults", "a checkpoint that is cut off or of something else is refused, and the model is as it was"
)
@pytest.mark.parametrize("damage", ["cut off", "flipped", "text", "empty", "code"])
def test_damaged_checkpoints(damage, tmp_path):
    model, path = Network(), tmp_path / "state.pt"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(Network().state_dict(), path)
    content = bytearray(path.read_bytes())
    if damage == "code":  # which a file of weights must not run
        torch.save({"codes.theta": pytest.approx}, path)
    else:
        content[len(content) // 2 :] = {"flipped": bytes(len(content) - len(content) // 2)}.get(damage, b"")
        path.write_bytes({"text": b"theta: 0.1\n", "empty": b""}.get(damage, bytes(content)))
    with pytest.raises(Exception) as caught:  # torch.load has an exception for each of them
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert not isinstance(caught.value, AssertionError)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.supports("faults", "damaged checkpoints, settings and results are named, with what to do")
@pytest.mark.parametrize(
    "content", ["", "rows", "[]", "{}", '{"rows": 1}', '{"rows": [1]}', '{"rows": [{"case":', None]
)
def test_files_that_hold_no_results_of_the_benchmark(content, tmp_path):
    pytest.importorskip("tqdm", reason="the benchmark needs tqdm")
    from benchmarks import run

    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"results\.json holds no results of python -m benchmarks: \w+: "):
        run.read(path)
