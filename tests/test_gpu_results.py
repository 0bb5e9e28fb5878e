"""How make test-gpu ends without a GPU, and what it writes with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_results
import pytest

ROOT = Path(__file__).parents[1]
FACTS = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "date": "2030-01-01"}


def report(nodeid: str, longrepr=None) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, longrepr=longrepr)


def test_without_a_gpu_one_sentence_and_the_exit_status():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "--device", "cuda"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == gpu_results.NO_GPU == 3
    (line,) = (line for line in (run.stdout + run.stderr).splitlines() if "cannot run here" in line)
    assert "torch finds no GPU" in line


def test_what_stands_against_it_is_told():
    assert "no GPU" in gpu_results.obstacle(False, "")
    assert gpu_results.obstacle(True, "the kernels are missing") == "the kernels are missing"
    assert gpu_results.obstacle(True, "") == ""


def test_a_whole_run_is_recorded(tmp_path):
    stats = {
        "passed": [report("a"), report("b")],
        "failed": [report("c")],
        "skipped": [report("d", ("file", 1, "Skipped: needs two GPUs"))],
        "": [report("setup of a")],
    }
    said = gpu_results.write(stats, 1, tmp_path, FACTS)
    file = tmp_path / "nvidia-h100-80gb-hbm3.json"
    assert said == f"Written: {file}"
    written = json.loads(file.read_text())
    assert written["counts"] == {"passed": 2, "failed": 1, "error": 0, "skipped": 1, "xfailed": 0}
    assert (written["exit_status"], written["failed"], written["machine"]) == (1, ["c"], FACTS)
    assert written["skipped"] == ["d: Skipped: needs two GPUs"]


@pytest.mark.parametrize(
    ("stats", "collected", "whole"),
    [
        ({"passed": [report("a")], "skipped": [report("b")]}, 2, True),
        ({"passed": [report("a")], "failed": [report("b")], "error": [report("b")]}, 2, True),
        ({"passed": [report("a")], "deselected": [report("b")]}, 1, False),
        ({"failed": [report("a")]}, 2, False),  # pytest -x
        ({}, 0, False),
    ],
)
def test_a_part_of_the_tests_is_no_record(stats, collected, whole):
    assert gpu_results.is_whole(stats, collected) == whole
