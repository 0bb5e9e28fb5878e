"""The executor of CUDA source (cuda_sim/README.md): what it runs is right, and what is wrong it catches.

- cuda_sim/selftest.cpp tries the executor by itself in each mode: correct kernels, and planted defects one by one.
- cuda_sim/kernels.cpp with check.py and packed_kernels.cpp with check_packed.py run the kernels of csrc/cuda without
  PyTorch, as they are and with planted defects.
- The tests of the CUDA operators marked `every_mode` run under the sanitizers and under the race checker.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_sim_build import CSRC, HERE, MODES, SIM, environment, obstacle, sanitizer

if obstacle():
    pytest.skip(obstacle(), allow_module_level=True)

# What the executor says about each defect of selftest.cpp: in every mode, or by mode. A mode that is not named does not
# see the defect: only the address sanitizer knows where global memory ends, only the race checker what is ordered.
RACE = "race in (shared|global) memory: after the (read|write|atomic) in selftest.cpp:\\d+ by .* nothing orders the "
WRONG = "wrong result"
BEHIND = {"race": "at byte 384 of the 384 bytes of the shared array sums in selftest.cpp", "address": "index 96 out of"}
DEFECTS = {
    "no_barrier_before": {"fast": WRONG, "address": WRONG, "race": RACE + "read"},
    "no_barrier_after": {"fast": WRONG, "address": WRONG, "race": RACE},
    "shared_write_behind": {"fast": "wrote 1 bytes behind the end of the shared array sums, declared", **BEHIND},
    "shared_read_behind": {"fast": WRONG, **BEHIND},
    "shared_write_before": {"fast": "1 bytes before the shared array", "race": "at byte -4", "address": "index -1"},
    "shared_unwritten": {"fast": WRONG, "address": WRONG, "race": "read of shared memory that no thread wrote"},
    "barrier_divergent": "threads of a block wait at different barriers|only 64 of 96 threads reach __syncthreads",
    "barriers_of_two_lines": "threads of a block wait at different barriers, selftest.cpp:\\d+ and selftest.cpp:\\d+",
    "early_return": "only 95 of 96 threads reach __syncthreads in selftest.cpp",
    "global_write_behind": {"address": "heap-buffer-overflow"},
    "global_read_behind": {"address": "heap-buffer-overflow"},
    "global_race": {"race": RACE},
    "block_sum_not_atomic": {"race": RACE + "read"},
    "atomic_and_plain": {"race": RACE},
    "no_fence_before_atomic": {"race": RACE + "read"},
    "no_fence_behind_atomic": {"race": RACE + "read"},
    "lanes_leave_before_shuffle": "names lanes that have ended|waits in a shuffle .* ended: 16-31",
    "shuffle_outside_mask": "a shuffle in selftest.cpp:\\d+ reads lane 16, which its mask 0x0000ffff leaves out",
    "mask_without_caller": "its mask 0x0000ffff leaves out the thread that calls",
    "mask_beyond_block": "its mask 0xffffffff names lanes beyond the block, 8-31",
    "shuffle_meets_ballot": "lane 0 waits in a shuffle .*; lane 3 waits in a ballot",
    "lane_never_arrives": "waits in a shuffle .* at __syncthreads: 3",
    "no_syncwarp": {"fast": WRONG, "address": WRONG, "race": RACE},
    "shuffle_for_syncwarp": {"race": RACE},
    "syncwarp_of_others": {"fast": WRONG, "address": WRONG, "race": RACE},
    "copy_without_wait": {"fast": "ends with a copy_async16 in flight", "address": "ends with a copy_async16 in flight",
                          "race": "copy_async16 is in flight, issued in selftest.cpp"},
    "copy_waits_too_late": {"fast": WRONG, "address": WRONG, "race": "read of shared memory to which a copy_async16"},
    "copy_of_others_without_barrier": {"fast": WRONG, "address": WRONG, "race": f"{RACE}|in flight|no thread wrote"},
    "copy_over_what_is_read": {"fast": WRONG, "address": WRONG, "race": f"{RACE}|in flight"},
    "copy_misaligned": "misaligned copy_async16 in selftest.cpp",
    "copy_to_global": "copy_async16 in selftest.cpp:\\d+ writes outside of shared memory",
    "copy_from_shared": "copy_async16 in selftest.cpp:\\d+ reads shared memory",
    "load_misaligned": "misaligned access of 16 bytes in selftest.cpp",
    "store_misaligned": "misaligned access of 16 bytes in selftest.cpp",
    "load_behind_shared": "access of 16 bytes beyond shared memory in selftest.cpp",
    "atomic_misaligned": "misaligned access of 4 bytes in selftest.cpp",
    "mma_by_half_a_warp": "mma .* names lanes that have ended|waits in mma .* ended: 16-31",
}  # fmt: skip

# Each is one edit of the kernels' source, the mode that is to see it, and what is then said.
KERNEL_RACE = (
    "(race in shared memory: after the (read|write) in reduction.cuh:\\d+ by thread \\d+ nothing orders the \\w+"
    "|read of shared memory that no thread wrote,) in reduction.cuh:\\d+"
)
KERNEL_DEFECTS = {
    "no barrier between the steps of a sum": (
        "reduction.cuh", "    __syncthreads();\n    if (thread < half)", "    if (thread < half)", "race", KERNEL_RACE),
    "no barrier between two sums": (
        "reduction.cuh", "  __syncthreads();  // a previous call may still be reading\n", "", "race", KERNEL_RACE),
    "a barrier that only some threads reach": (
        "threshold_kernels.cuh", "sum = block_sum(sum, width);",
        "if (walk.channel < plan.channels) sum = block_sum(sum, width);", "fast",
        "only \\d+ of 256 threads reach __syncthreads|wait at different barriers"),
    "shared memory beyond its end": (
        "reduction.cuh", "sums[thread + half]", "sums[thread + 2 * half]", "race",
        "bytes of the shared array sums in reduction.cuh"),
    "a write beyond the tensor": (
        "penalty_kernels.cuh", "i < size; i += step) {\n    grad_x", "i <= size; i += step) {\n    grad_x", "address",
        "heap-buffer-overflow"),
    "partial sums beyond the last channel": (
        "threshold_kernels.cuh", "if (thread < width && walk.channel < plan.channels)", "if (thread < width)",
        "address", "heap-buffer-overflow"),
    "partial sums of different tasks in one place": (
        "threshold_kernels.cuh", "const int64_t partial = task % plan.splits * plan.channels + walk.channel;",
        "const int64_t partial = walk.channel;", "race", "race in global memory: .* by another block"),
    "the last element left out": (
        "threshold_kernels.cuh", "end : plan.channel_size();", "end : plan.channel_size() - 1;", "fast", "differs"),
    "the last partial left out": (
        "reduction.cuh", "part < parts && i < count", "part < parts - 1 && i < count", "fast", "differs"),
}  # fmt: skip

PACKED_RACE = "(nothing orders the (read|write)|shared memory that no thread wrote,|in flight).* in {}.cuh:"
FROM_HERE = "room_of(shape, run, slab) + part.first{};\n#pragma unroll\n    for (int m = 0; m < 16; ++m)\n      if"
PACKED_DEFECTS = {
    "no barrier behind a copied table": (
        "synthesis_kernels.cuh", "    __syncthreads();  // the table is there,", "//", "race",
        PACKED_RACE.format("synthesis_kernels")),
    "no barrier between a list of non-zeros and its use": (
        "synthesis_kernels.cuh", "        __syncwarp();\n#pragma unroll 1\n        for (int q", "for (int q", "race",
        PACKED_RACE.format("synthesis_kernels")),
    "a synthesis without the last column of its tile": (
        "synthesis_kernels.cuh", "i_half < (S::warp_columns - 1) * stride + taps", "i_half < S::warp_columns + 1",
        "fast", "differs"),
    "pieces without those of the tile before": (
        "synthesis_kernels.cuh", "late_x > 0 ? late_x / pitch_x : 0", "from_x / pitch_x", "fast", "differs"),
    "momentum with the wrong sign": (
        "synthesis_kernels.cuh", "out += c.before_scale", "out -= c.before_scale", "fast", "differs"),
    "no barrier before products are staged": (
        "analysis_kernel.cuh", "    __syncthreads();  // plane and weights are read\n", "", "race",
        PACKED_RACE.format("analysis_kernel")),
    "weights copied without a wait": (
        "analysis_kernel.cuh", "      copy_async_wait<0>();\n", "", "fast", "copy_async16 in flight|differs"),
    "no barrier between sorting and sums": (
        "correlation_kernel.cuh", "      __syncthreads();\n#pragma unroll\n      for (int a", "for (int a", "race",
        PACKED_RACE.format("correlation_kernel")),
    "values packed one place too far": (
        "pack_kernels.cuh", FROM_HERE.format(""), FROM_HERE.format(" + 1"), "address", "heap-buffer-overflow"),
}  # fmt: skip
# The source that runs the kernels, the program that checks them, and their defects.
HARNESSES = {"kernels": ("check.py", KERNEL_DEFECTS), "packed_kernels": ("check_packed.py", PACKED_DEFECTS)}

over_modes = pytest.mark.parametrize("mode", MODES)


def complains(command: list, mode: str) -> str:
    """What a program says that has to end with status 1, or be ended by a sanitizer; empty when all is well."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(mode))
    if result.returncode == 0:
        assert "passed" in result.stdout, result.stdout + result.stderr
        return ""
    return result.stdout + result.stderr or f"status {result.returncode}"


def planted(folder: Path, *edits: tuple[str, str, str]) -> Path:
    """A copy of csrc in which, file by file, something is replaced."""
    for name in ("core", "cuda"):
        shutil.copytree(CSRC / name, folder / name)
    for file, old, new in edits:
        source = (folder / "cuda" / file).read_text()
        assert source.count(old) == 1, f"{file} has changed: plant the defect anew"
        (folder / "cuda" / file).write_text(source.replace(old, new))
    return folder


@pytest.fixture(scope="module")
def builds(cuda_sim, tmp_path_factory):
    """Futures of all that has to be compiled, the quickest first."""
    started = {}
    for mode in MODES:
        if mode != "address" or sanitizer():
            selftest = cuda_sim.object(SIM / "selftest.cpp", *MODES[mode])
            started["selftest", mode] = cuda_sim.link(f"selftest_{mode}", mode, [selftest])
            for harness in HARNESSES:
                kernels = cuda_sim.object(SIM / f"{harness}.cpp", *MODES[mode])
                started[harness, mode] = cuda_sim.link(f"{harness}_{mode}.so", mode, [kernels], "-shared")
    # The switch between threads of processors other than x86-64.
    portable = [cuda_sim.object(SIM / "executor.cpp", "-O2", "-DCUDA_SIM_UCONTEXT"), *cuda_sim.executor("fast")[1:]]
    portable.append(cuda_sim.object(SIM / "selftest.cpp", *MODES["fast"]))
    started["selftest", "portable"] = cuda_sim.link("selftest_portable", None, portable)
    out = tmp_path_factory.mktemp("planted")
    for harness, (_, defects) in HARNESSES.items():
        for i, (name, (file, old, new, mode, _)) in enumerate(defects.items()):
            if mode != "address" or sanitizer():
                csrc = planted(out / f"{harness}_{i}", (file, old, new))
                kernels = cuda_sim.object(SIM / f"{harness}.cpp", *MODES[mode], csrc=csrc)
                started[name] = cuda_sim.link(f"{harness}_{i}.so", mode, [kernels], "-shared")
    for mode in ("race", "address", "fast"):  # fast: for the tests of other files
        if mode != "address" or sanitizer():
            started["operators", mode] = cuda_sim.operators(mode) if mode == "fast" else cuda_sim.tests(mode)
    return lambda *name: started[name if len(name) > 1 else name[0]].result()


@pytest.fixture
def needs_sanitizer(request):
    if request.getfixturevalue("mode") == "address" and not sanitizer():
        pytest.skip("g++ has no address sanitizer (libasan)")


# --- the executor by itself -------------------------------------------------------------------------------------------


@over_modes
def test_correct_kernels_run(builds, needs_sanitizer, mode):
    assert complains([builds("selftest", mode)], mode) == ""


def test_correct_kernels_run_with_portable_switches(builds):
    assert complains([builds("selftest", "portable")], "fast") == ""


def test_every_defect_is_in_the_table(builds):
    names = subprocess.run([builds("selftest", "fast"), "--list"], capture_output=True, text=True).stdout.split()
    assert sorted(names) == sorted(DEFECTS)


EXPECTED = [
    (defect, mode, complaint if isinstance(complaint, str) else complaint[mode])
    for defect, complaint in DEFECTS.items()
    for mode in MODES
    if isinstance(complaint, str) or mode in complaint
]


@pytest.mark.parametrize("defect, mode, complaint", EXPECTED, ids=[f"{defect}-{mode}" for defect, mode, _ in EXPECTED])
def test_planted_defect_is_caught(builds, needs_sanitizer, defect, mode, complaint):
    assert re.search(complaint, complains([builds("selftest", mode), defect], mode))


# --- the kernels of csrc/cuda -----------------------------------------------------------------------------------------


def check(harness: str, library: Path, mode: str) -> str:
    return complains([sys.executable, SIM / HARNESSES[harness][0], library], mode)


@over_modes
@pytest.mark.parametrize("harness", HARNESSES)
def test_kernels_match_numpy(builds, needs_sanitizer, harness, mode):
    assert check(harness, builds(harness, mode), mode) == ""


PLANTED = [
    (harness, name, mode, complaint)
    for harness, (_, defects) in HARNESSES.items()
    for name, (*_, mode, complaint) in defects.items()
]


@pytest.mark.parametrize(
    "harness, name, mode, complaint", PLANTED, ids=[f"{name}-{mode}" for _, name, mode, _ in PLANTED]
)
def test_defect_planted_in_a_kernel_is_caught(builds, needs_sanitizer, harness, name, mode, complaint):
    assert re.search(complaint, check(harness, builds(name), mode))


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["address", "race"])
def test_operators_in_every_mode(builds, needs_sanitizer, mode):
    result = builds("operators", mode)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 20


def test_operators_show_defects(cuda_sim, tmp_path):
    """Inside of PyTorch's process: a complaint is an exception, and what no kernel wrote is NaN."""
    csrc = planted(
        tmp_path,
        ("reduction.cuh", "    __syncthreads();\n    if (thread < half)", "    if (thread < half)"),
        ("penalty_kernels.cuh", "i < size; i += step) {\n    grad_x", "i < size - 1; i += step) {\n    grad_x"),
    )
    library = cuda_sim.operators("race", csrc=csrc, files=["penalty.cu"]).result()
    program = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from cuda_sim_build import Operators
ops = Operators({str(library)!r})
try:
    ops.l1_norm(torch.ones(5000), 0.5)
except RuntimeError as error:
    print("raised:", error)
print("gradient:", ops.l1_norm_backward(torch.tensor(2.0), torch.ones(3)).tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(f"raised: {KERNEL_RACE}.*kernel dsc::cuda::l1_norm_kernel<float>.*thread", result.stdout)
    assert "gradient: [2.0, 2.0, nan]" in result.stdout
