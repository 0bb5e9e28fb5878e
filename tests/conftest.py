"""What the tests share: seeds, and how near a result has to be to the truth."""

from __future__ import annotations

import os

# Many small parallel regions on a machine that others use too: waiting threads are to sleep, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from cuda_sim_build import cuda_sim, ops  # noqa: F401 (fixtures)

from dsc_ops import _C


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
