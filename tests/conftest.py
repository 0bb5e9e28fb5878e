"""What the tests share: seeds, the instruction set levels of the CPU, and the device that tests/test_gpu.py runs on."""

from __future__ import annotations

import os

# Many small parallel regions on a machine that others use too: waiting threads are to sleep, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gpu_results
import pytest
import torch
from cuda_sim_build import cuda_sim, ops  # noqa: F401 (fixtures)

import dsc_ops
from dsc_ops import _C

# Files that take minutes, the longest first: what begins last is not to keep one process busy while the others have
# nothing left to do.
LONG = ("test_sanitizers", "test_cuda_", "test_packed", "test_example_training")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="run tests/test_gpu.py on this device: cuda needs a GPU and the CUDA kernels, ends with exit status "
        f"{gpu_results.NO_GPU} without them, and writes tests/results/GPU.json; cpu tries the tests themselves",
    )
    parser.addoption(
        "--best-level",
        action="store_true",
        help="of the tests that run with every instruction set level of the CPU only those with the best",
    )


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "supports(area, promise): a row of README.md's support table (support_table.py)")
    device = config.getoption("--device")
    os.environ.pop("DSC_OPS_TEST_DEVICE", None)
    if device is None:
        return
    os.environ["DSC_OPS_TEST_DEVICE"] = device  # read where test_gpu.py is imported
    if device == "cuda" and (obstacle := gpu_results.obstacle(torch.cuda.is_available(), dsc_ops._library.cuda_reason)):
        pytest.exit(f"the tests on a GPU cannot run here: {obstacle}", returncode=gpu_results.NO_GPU)


def pytest_collection_modifyitems(config, items) -> None:
    wanted = _is_of_best_level if config.getoption("--best-level") else _is_of_own_kernels
    left_out = [item for item in items if not wanted(item)]
    place = {}
    for number, item in enumerate(items):
        place.setdefault(_whatever_level(item), number)
    # The levels of a test follow each other: numerics.remembered
    items[:] = sorted(filter(wanted, items), key=lambda item: (_begins(item), place[_whatever_level(item)]))
    config.hook.pytest_deselected(items=left_out)


def _begins(item) -> int:
    """The place of a test's file in :data:`LONG`, or after all of them."""
    return next((i for i, name in enumerate(LONG) if item.path.name.startswith(name)), len(LONG))


def _whatever_level(item) -> str:
    return item.nodeid.replace(_level(item) or "", "", 1)


def _level(item) -> str | None:
    return item.callspec.params.get("capability") if hasattr(item, "callspec") else None


def _is_of_best_level(item) -> bool:
    return _level(item) in (None, _C.cpu_capabilities()[-1])


def _is_of_own_kernels(item) -> bool:
    """Whether no other level has the same kernels: avx512_bf16 is avx512 but for bfloat16."""
    if _level(item) != "avx512" or "avx512_bf16" not in _C.cpu_capabilities():
        return True
    return torch.bfloat16 in item.callspec.params.values() or "bfloat16" in item.name


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which shares the tests out to processes
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        """A file to a process; to one of them all that need the CUDA source compiled for the CPU."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "cuda" if "test_cuda_" in file else file

    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    if config.getoption("--device") != "cuda":
        return
    chosen = any("::" in argument for argument in config.args)
    whole = not chosen and gpu_results.is_whole(terminalreporter.stats, terminalreporter._session.testscollected)
    said = gpu_results.write(terminalreporter.stats, int(exitstatus)) if whole else gpu_results.PART
    terminalreporter.write_line(said)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# The kernels of the CPU are not used where those of CUDA stand in for them.
@pytest.fixture(params=_C.cpu_capabilities()[-1:] if os.environ.get("DSC_TEST_KERNELS") else _C.cpu_capabilities())
def capability(request):
    """Every instruction set level that this machine has."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture(scope="session", autouse=True)
def kernels(request):
    """DSC_TEST_KERNELS=cuda-sim: the operators on CPU tensors are what they are on CUDA, executed by tests/cuda_sim."""
    if os.environ.get("DSC_TEST_KERNELS") != "cuda-sim":
        yield
        return
    from cuda_sim_build import in_place_of_cpu

    with in_place_of_cpu(request.getfixturevalue("ops")):
        yield
