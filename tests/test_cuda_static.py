"""tests/cuda_static: what it reads from listings, what it calls a breach, and that the compiler's output reaches it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_static import budget, objects
from cuda_static.__main__ import main
from cuda_static.budget import Budget, Promise
from cuda_static.objects import Kernel, Kernels, Missing, short_name
from cuda_static.occupancy import Launch, Occupancy, occupancies

ROOT = Path(__file__).parents[1]
NAME = "_ZN3dsc4cuda4copyIfEEvPKT_PS2_"


# --- reading ----------------------------------------------------------------------------------------------------------

RESOURCES = f"""
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN3dsc4cuda5plainEPf:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {NAME}:
  REG:18 STACK:24 SHARED:5120 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SECTIONS = f"""
64-bit ELF: type=ET_EXEC, ABI=8, sm=90, toolkit=13.0, flags=0x6005a04
Sections:
Index Offset   Size ES Align                      Type    Flags Link     Info Name
   10    e80    100  0 80                     PROGBITS        6    3  800000d .text._ZN3dsc4cuda5plainEPf
   13   1480      0  0  1                       NOBITS        3    0        0 .nv.shared.reserved.0
   15   1480   1400  0  4                       NOBITS       43    0       12 .nv.shared.{NAME}

.nv.info
	<0x1>
	Attribute:	EIATTR_REGCOUNT
	Format:	EIFMT_SVAL
	Value:	function: {NAME}(0xf)	register count: 18

.nv.info._ZN3dsc4cuda5plainEPf
	<0x5>
	Attribute:	EIATTR_MAXREG_COUNT
	Format:	EIFMT_HVAL
	Value:	0xff

.nv.info.{NAME}
	<0x9>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x2 0x1 
	<0x11>
	Attribute:	EIATTR_PARAM_CBANK
	Format:	EIFMT_SVAL
	Value:	0x12 0x100210 
"""  # noqa: W291

CODE = f"""
	.target	sm_90
	.section	.text.{NAME},"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=18"
.text.{NAME}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HFMA2.MMA R15, -RZ, RZ, 0, 4.76837158203125e-07 ;
        /*0020*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], [R4.64] ;
        /*0040*/             @!UP0 LDS.U.128 R8, [R9] ;
        /*0050*/                   HMMA.1688.F32.TF32 R4, R4, R8, R4 ;
.L_x_0:
        /*0060*/                   STL.64 [R1], R4 ;
        /*0070*/              @P1  LDL R5, [R1] ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00a0*/                   LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;
"""


def test_listings_are_read():
    kernels = Kernels("sm_90")
    for read, text in (
        (objects.read_sections, SECTIONS),
        (objects.read_instructions, CODE),
        (objects.read_resources, RESOURCES),
    ):
        read(kernels, text.splitlines())
    plain, copy = kernels["_ZN3dsc4cuda5plainEPf"], kernels[NAME]
    assert (copy.registers, copy.stack, copy.shared, copy.threads) == (18, 24, 4096, 256)
    assert (plain.registers, plain.stack, plain.shared, plain.threads) == (8, 0, 0, 1024)
    counts = {what: copy.count(what) for what in objects.COUNTED}
    assert counts == {
        "spills": 2,
        "loads128": 2,
        "stores128": 1,
        "copies128": 1,
        "shared128": 1,
        "tensor": 1,
        "atomics": 0,
    }
    assert plain.instructions == Counter()


def test_what_cuda_reserves_is_no_shared_memory_of_a_kernel():
    sizes = {}
    for architecture in ("sm_80", "sm_90", "sm_120"):
        kernels = Kernels(architecture)
        objects.read_sections(kernels, SECTIONS.splitlines())
        sizes[architecture] = kernels[NAME].shared
    assert sizes == {"sm_80": 5120, "sm_90": 4096, "sm_120": 4096}


@pytest.mark.parametrize(
    "opcode, kinds",
    [
        ("HFMA2.MMA", set()),
        ("HGMMA.64x8x16.F32.BF16", {"tensor"}),
        ("DMMA.884", {"tensor"}),
        ("UTCHMMA", {"tensor"}),
        ("LDG.E.128", {"loads128"}),
        ("LDG.E.64", set()),
        ("LDGSTS.E.BYPASS.LTC128B.128", {"copies128"}),
        ("LDGSTS.E.LTC128B", set()),
        ("STS.128", {"shared128"}),
        ("ATOMG.E.ADD", {"atomics"}),
        ("REDUX.SUM", set()),  # within a warp
        ("LDL.LU.64", {"spills"}),
    ],
)
def test_instructions_are_told_apart(opcode, kinds):
    kernel = Kernel("k", "sm_90", instructions=Counter([opcode]))
    assert {what for what in objects.COUNTED if kernel.count(what)} == kinds


@pytest.mark.parametrize(
    "demangled, short",
    [
        ("void dsc::cuda::sum<float, dsc::Rule<(dsc::Kind)2> >(float const*, long)", "sum<float, Rule<2>>"),
        (
            "void dsc::cuda::(anonymous namespace)::pack<c10::BFloat16, -1, true>(dsc::Plan<3>)",
            "pack<BFloat16, -1, true>",
        ),
        ("dsc::plain(float*)", "plain"),
        ("unmangled", "unmangled"),
    ],
)
def test_names_are_short(demangled, short):
    assert short_name(demangled) == short


# --- occupancy --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def header() -> None:
    try:
        occupancies([])
    except Missing as reason:
        pytest.skip(str(reason))


def test_occupancy_is_that_of_the_occupancy_calculator(header):
    """Worked by hand from 65536 registers in units of 256 a warp, 164, 228 and 100 KiB of shared memory with 1 KiB
    for CUDA in each block, 2048, 2048 and 1536 threads and 32, 32 and 24 blocks."""
    expected = {
        Launch("sm_80", 32, 0, 0, 256): (8, 100, {"warps", "registers"}),
        Launch("sm_80", 33, 0, 0, 256): (6, 75, {"registers"}),  # 40 registers a thread: 6.4 blocks
        Launch("sm_80", 64, 0, 0, 512): (2, 50, {"registers"}),
        Launch("sm_80", 32, 0, 40 * 1024, 256): (4, 50, {"shared memory"}),  # 4 x 41 KiB
        Launch("sm_90", 32, 0, 40 * 1024, 256): (5, 62.5, {"shared memory"}),  # 5 x 41 KiB
        Launch("sm_90", 64, 1024, 57 * 1024, 512): (2, 50, {"registers"}),
        Launch("sm_100", 255, 0, 0, 256): (1, 12.5, {"registers"}),
        Launch("sm_120", 32, 0, 0, 1024): (1, 200 / 3, {"warps"}),
        Launch("sm_120", 16, 0, 0, 32): (24, 50, {"blocks", "barriers"}),
        Launch("sm_120", 32, 0, 100 * 1024, 256): (0, 0, {"shared memory"}),  # 101 KiB with CUDA's own
    }
    found = occupancies(list(expected))
    for launch, answer in zip(expected, found, strict=True):
        blocks, percent, limits = expected[launch]
        assert (answer.blocks, set(answer.limits)) == (blocks, limits), launch
        assert answer.percent == pytest.approx(percent), launch


def test_an_unknown_device_is_named(header):
    with pytest.raises(Missing, match="sm_61.*in the table"):
        occupancies([Launch("sm_61", 32, 0, 0, 256)])


# --- breaches ---------------------------------------------------------------------------------------------------------

GOOD = Kernel(
    "copy", "sm_80", 32, threads=256, name="copy<float>", instructions=Counter({"LDG.E.128": 2, "STG.E.128": 1})
)
ROW = budget.Row(GOOD, 256, 0, Occupancy(8, 100.0, ("warps",)))
BUDGET = Budget(
    ["sm_80"],
    [Promise("copy<*", occupancy=50, loads128=2, stores128=1)],
    {"copy<float>": {"threads": 256, "registers": [32], "shared": [0], "occupancy": [100]}},
)


def with_kernel(**changes) -> budget.Row:
    return replace(ROW, kernel=replace(GOOD, **changes))


def test_a_kernel_within_its_budget_breaches_nothing():
    assert budget.breaches([ROW], BUDGET) == []
    assert budget.breaches([with_kernel(registers=30)], BUDGET) == []


@pytest.mark.parametrize(
    "row, sentence",
    [
        (with_kernel(registers=33), "33 registers, the budget is 32"),
        (with_kernel(shared=16), "16 bytes of static shared memory, the budget is 0"),
        (with_kernel(stack=8), "a stack of 8 bytes, where there may be none"),
        (with_kernel(instructions=GOOD.instructions + Counter({"STL": 1, "LDL.64": 2})), "3 instructions that spill"),
        (with_kernel(instructions=Counter({"LDG.E.128": 1, "STG.E.128": 1})), "1 128-bit loads, promised are 2"),
        (with_kernel(instructions=Counter({"LDG.E.128": 2, "STG.E.64": 1})), "0 128-bit stores, promised are 1"),
        (replace(ROW, occupancy=Occupancy(3, 37.5, ("registers",))), "38 %, limited by registers; promised 50 %"),
        (replace(ROW, occupancy=Occupancy(7, 87.5, ("warps",))), "occupancy 88 %, the budget is 100 %"),
        (replace(ROW, threads=512), "512 threads, its launch bounds are 256"),
        (with_kernel(name="other<float>"), "other<float>, sm_80: no promise fits it, add one by hand"),
        (with_kernel(name="copy<double>"), "copy<double>, sm_80: it has no budget"),
    ],
)
def test_every_breach_is_told(row, sentence):
    assert any(sentence in breach for breach in budget.breaches([row], BUDGET))


def test_budgets_and_kernels_answer_to_each_other():
    wide = replace(BUDGET, architectures=["sm_80", "sm_90"])
    (breach,) = budget.breaches([ROW], wide)
    assert breach.startswith("copy<float>: is not compiled for sm_90")
    more = replace(BUDGET, kernels=BUDGET.kernels | {"old<float>": BUDGET.kernels["copy<float>"]})
    assert budget.breaches([ROW], more) == ["old<float>: has a budget, and is in no object"]
    unused = replace(BUDGET, promises=[*BUDGET.promises, Promise("gone<*", 50)])
    assert budget.breaches([ROW], unused) == ["gone<*: a promise that no kernel falls under"]


def test_the_first_promise_that_fits_applies():
    first = replace(BUDGET, promises=[Promise("copy<float>", 90, tensor=1), *BUDGET.promises])
    assert first.promise("copy<float>").tensor == 1 and first.promise("copy<double>").tensor == 0


def test_an_occupancy_may_be_promised_for_each_architecture():
    half = replace(ROW, occupancy=Occupancy(4, 50.0, ("registers",)))
    entry = BUDGET.kernels["copy<float>"] | {"occupancy": [50]}
    for promised, kept in (({"sm_80": 50}, True), ({"sm_80": 51}, False), ({"sm_90": 100}, True)):
        limits = replace(BUDGET, promises=[Promise("copy<*", promised)], kernels={"copy<float>": entry})
        assert (budget.breaches([half], limits) == []) == kept


def test_matrix_instructions_and_copies_are_held_to_their_promise():
    asked = replace(BUDGET, promises=[Promise("copy<*", 50, copies128=1, shared128=1, tensor=2)])
    found = " ".join(budget.breaches([ROW], asked))
    for words in ("copies to shared memory, promised are 1", "accesses to shared memory", "0 matrix instructions"):
        assert words in found
    kept = with_kernel(instructions=Counter({"LDGSTS.E.128": 1, "LDS.128": 1, "HMMA.16816.F32.BF16": 2}))
    assert budget.breaches([kept], asked) == []


def test_an_update_replaces_the_measured_part_alone(tmp_path):
    file = tmp_path / "budget.json"
    promises = [{"kernels": "copy<*", "occupancy": 50, "why": "a reason"}]
    file.write_text(json.dumps({"architectures": ["sm_80"], "promises": promises, "kernels": {"old": {}}}))
    twice = [with_kernel(registers=30), with_kernel(registers=31)]  # an instance that two objects have
    budget.write(file, budget.measured(twice, BUDGET))
    written = json.loads(file.read_text())
    assert written["promises"] == promises and written["architectures"] == ["sm_80"]
    assert written["kernels"] == {"copy<float>": {"threads": 256, "registers": [31], "shared": [0], "occupancy": [100]}}
    assert budget.breaches([*twice], budget.read(file)) == []


def test_the_committed_budget_covers_the_architectures_asked_for():
    limits = budget.read(budget.FILE)
    assert {"sm_80", "sm_90", "sm_120"} <= set(limits.architectures)
    built = re.search(r'^ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    assert [name.removesuffix("+PTX").replace(".", "") for name in built.split(";")] == [
        name.removeprefix("sm_") for name in limits.architectures
    ]
    for name, entry in limits.kernels.items():
        assert limits.promise(name), name
        assert all(len(entry[what]) == len(limits.architectures) for what in ("registers", "shared", "occupancy")), name


# --- from source to breach --------------------------------------------------------------------------------------------

PLANTED = """
struct alignas(16) Four { float values[4]; };
template <typename T>
__global__ void __launch_bounds__(256) copy(const T* from, T* to) {
  reinterpret_cast<Four*>(to)[threadIdx.x] = reinterpret_cast<const Four*>(from)[threadIdx.x];
}
template __global__ void copy<float>(const float*, float*);

__global__ void __launch_bounds__(256) narrow(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }

__global__ void __launch_bounds__(256) local_array(const int* from, float* to) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[from[i] % 64] = i;
  to[threadIdx.x] = values[from[threadIdx.x] % 64];
}

__global__ void __launch_bounds__(1024, 2) spilling(const float* from, float* to) {  // at most 32 registers
  float values[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) values[i] = from[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) to[i * 1024 + threadIdx.x] = values[i] * values[(i * 7 + 1) % 48];
}

extern __shared__ float dynamic[];
__global__ void __launch_bounds__(256) sharing(const float* from, float* to) {
  __shared__ float fixed[512];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = fixed[255 - threadIdx.x] + dynamic[255 - threadIdx.x];
}
"""


def find_nvcc() -> Path:
    """Of the packages or CUDA_HOME, else on PATH; it is not part of the test environment."""
    homes = [folder / "bin" / "nvcc" for folder in objects.nvidia_folders()]
    nvcc = next((path for path in homes if path.is_file()), None) or shutil.which("nvcc")
    return Path(nvcc) if nvcc else pytest.skip("there is no nvcc here")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The kernels of an object: one good and four that break a promise, each for two architectures."""
    try:
        objects.find_tool("cuobjdump"), objects.find_tool("nvdisasm")
    except Missing as reason:
        pytest.skip(str(reason))
    folder, nvcc = tmp_path_factory.mktemp("planted"), find_nvcc()
    (folder / "planted.cu").write_text(PLANTED)
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    run = subprocess.run(
        [nvcc, "-c", *flags, folder / "planted.cu", "-o", folder / "planted.o"], capture_output=True, text=True
    )
    if run.returncode:
        pytest.skip(f"nvcc cannot compile here: {run.stderr.strip().splitlines()[-1]}")
    return objects.read_kernels(folder / "planted.o")


def test_planted_kernels_are_read_from_the_object(planted):
    found = {(kernel.name, kernel.architecture): kernel for kernel in planted}
    assert len(found) == 10
    for architecture in ("sm_80", "sm_90"):
        copy, narrow, local_array, spilling, sharing = (
            found[name, architecture] for name in ("copy<float>", "narrow", "local_array", "spilling", "sharing")
        )
        assert (copy.count("loads128"), copy.count("stores128"), copy.threads) == (1, 1, 256)
        assert (narrow.count("loads128"), narrow.count("stores128"), narrow.stack) == (0, 0, 0)
        assert local_array.stack >= 256 and local_array.count("spills") > 0
        assert spilling.count("spills") > 0 and spilling.registers <= 32 and spilling.threads == 1024
        assert sharing.shared == 2048 and sharing.stack == sharing.count("spills") == 0


def test_planted_defects_fail_the_check(planted, header, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cuda_static.__main__.read_kernels", lambda file: planted)
    file = tmp_path / "budget.json"
    names = ("copy<float>", "local_array", "narrow", "sharing", "spilling")
    promises = [{"kernels": name, "occupancy": 50, "loads128": 1} for name in ("copy<*", "narrow")]
    promises += [{"kernels": name, "occupancy": 50} for name in ("spilling", "local_array")]
    promises += [{"kernels": "sharing", "occupancy": 50, "dynamic_shared": 60 * 1024}]
    file.write_text(json.dumps({"architectures": ["sm_80", "sm_90"], "promises": promises, "kernels": {}}))
    arguments = ["planted.o", "--budget", str(file)]
    assert main(arguments) == 1
    assert capsys.readouterr().out.count("it has no budget") == 2 * len(names)

    assert main([*arguments, "--update"]) == 1  # what cannot be had by a budget remains
    told = capsys.readouterr().out
    breaches = {line.split(",")[0].removeprefix("BREACH  ") for line in told.splitlines() if line.startswith("BREACH")}
    assert breaches == {"narrow", "spilling", "local_array", "sharing"}
    assert told.count("narrow, sm_80: 0 128-bit loads, promised are 1") == 1
    assert "sharing, sm_90: occupancy 38 %, limited by shared memory; promised 50 %" in told

    content = json.loads(file.read_text())
    assert list(content["kernels"]) == list(names)
    content["kernels"]["copy<float>"]["registers"][1] -= 1
    file.write_text(json.dumps(content))
    assert main(arguments) == 1
    assert re.search(r"BREACH  copy<float>, sm_90: \d+ registers, the budget is \d+", capsys.readouterr().out)


def test_what_is_missing_is_said_in_one_sentence(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "nothing.o")]) == 2
    assert capsys.readouterr().err == f"cuda-check: {tmp_path / 'nothing.o'} is not there\n"
    monkeypatch.setattr("cuda_static.__main__.ROOT", tmp_path)
    assert main([]) == 2
    assert "built without CUDA kernels" in capsys.readouterr().err
    (tmp_path / "x.o").touch()
    monkeypatch.setattr(objects, "nvidia_folders", lambda: [])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main([str(tmp_path / "x.o")]) == 2
    assert "cuobjdump was not found: make cuda-check installs it" in capsys.readouterr().err
