"""What the tests share: seeds, and how near a result has to be to the truth."""

from __future__ import annotations

import os

# Many small parallel regions on a machine that others use too: waiting threads are to sleep, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from dsc_ops import _C


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "supports(area, promise): a row of README.md's support table (support_table.py)")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_C.cpu_capabilities())
def capability(request):
    """Every instruction set level that this machine has."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)
