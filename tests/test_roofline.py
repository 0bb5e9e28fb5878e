"""benchmarks/roofline.py: bytes and operations of the CUDA kernels, and the times that datasheets then predict."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("skimage", reason="the benchmarks need pip install dsc_ops[examples]")
pytest.importorskip("mlxtend", reason="the benchmarks need pip install dsc_ops[examples]")

from benchmarks import cases, program, roofline


def test_bytes_of_a_packed_code_are_those_of_its_parts():
    shape = roofline.shape_of(cases.CASES["denoise-gray"], 0.1)
    assert (shape.pixels, shape.products, shape.slabs, shape.wide) == (8 * 128 * 128, 49, 1, False)
    assert shape.non_zeros / shape.pixels == pytest.approx(6.4)
    assert shape.least / shape.pixels == pytest.approx(8 + 25.6)  # a mask and 6.4 values
    assert shape.packed / shape.pixels == pytest.approx(8 + 25.6 + 0.75)  # padding
    assert roofline.packed_minimum(shape, "forward") / shape.pixels == pytest.approx(71.2)  # x, next x, y
    wide = roofline.shape_of(cases.CASES["deep"], 0.1)
    assert wide.wide and wide.slabs == 2 and wide.masks == 16 * wide.pixels


def test_borders_of_tiles_are_those_of_the_layout():
    gray = roofline.shape_of(cases.CASES["denoise-gray"], 0.1)
    # 16 x 32 code pixels write (15 + 7) x (31 + 7) of signal, 8 x 16 read (7 + 7) x (15 + 7); 128 = 8 x 16 = 4 x 32
    assert gray.pieces == 4 * 8 * (8 * 4) * 22 * 38
    assert gray.halo((8, 16)) == 4 * 8 * (16 * 8) * 14 * 22
    stride = roofline.shape_of(cases.CASES["stem-imagenet"], 0.1)  # 112 x 112, stride 2, three channels
    assert stride.code_size == (112, 112)
    assert stride.pieces == 4 * 4 * (7 * 4) * 3 * (2 * 15 + 7) * (2 * 31 + 7)
    assert stride.halo((8, 16)) == 4 * 4 * (14 * 7) * 3 * (2 * 7 + 7) * (2 * 15 + 7)
    cifar = roofline.shape_of(cases.CASES["stem-cifar"], 0.1)  # segments of three taps: tiles of 8 x 32
    assert cifar.pieces == 4 * 32 * 4 * 3 * 10 * 34
    line = roofline.shape_of(cases.CASES["signal"], 0.1)  # 32 signals are 2 x 16 rows, 4096 = 128 x 32 = 256 x 16
    assert line.pieces == 4 * (2 * 128) * 16 * (31 + 65)
    assert line.halo((8, 16)) == 4 * (4 * 256) * 8 * (15 + 65)
    assert (gray.partials, roofline.shape_of(cases.CASES["deep"], 0.1).partials) == (256, 64)


def test_work_of_the_kernels_on_gray_pictures():
    """Bytes for each code pixel at a tenth, each a sum of: packed code 34.35, tiles 6.53, border 9.63 or 8.31,
    signal 4."""
    shape = roofline.shape_of(cases.CASES["denoise-gray"], 0.1)
    weight = 64 * 49 * 4 / shape.pixels
    packed, tiles, signal = 34.35, 4 * 22 * 38 / 512, 4.0
    border, wide_border = 4 * 14 * 22 / 128, 4 * 14 * 38 / 256
    expected = {
        "synthesis": packed + tiles + weight,
        "combine": tiles + 2 * signal,
        "analysis": border + 2 * packed + weight,
        "correlation with r": wide_border + packed + (25.6 + 0.75) + 513 * weight,
        "correlation with x": wide_border + packed + 513 * weight,
        "select": border + packed + 8 + (25.6 + 0.75) + weight,
        "unpack": packed + 256,
        "pack": packed + 256,
    }
    found = {name: kernel(shape).bytes / shape.pixels for name, kernel in roofline.KERNELS.items()}
    assert found == pytest.approx(expected)
    operations = {name: roofline.KERNELS[name](shape).operations / shape.pixels for name in expected}
    assert operations["synthesis"] == operations["correlation with x"] == pytest.approx(2 * 6.4 * 49)
    assert operations["analysis"] == operations["select"] == 2 * 64 * 49 + 4 * 64


def test_of_a_sliced_step_the_tape_is_left_for_memory():
    shape = roofline.shape_of(cases.CASES["denoise-gray"], 0.1)
    tape = 34.35 + 4
    assert roofline.FROM_MEMORY["forward"](shape) / shape.pixels == pytest.approx(tape)
    block_sums = 2 * 513 * 64 * 49 * 4 / shape.pixels
    assert roofline.FROM_MEMORY["backward"](shape) / shape.pixels == pytest.approx(tape + block_sums)


def test_eager_moves_so_many_dense_codes():
    """Seven codes with softshrink, sixteen with sign and relu, and five signals."""
    shape = roofline.shape_of(cases.CASES["denoise-gray"], 0.1)
    for name, codes in (("forward", 7), ("forward with a tape", 16)):
        schedule = roofline.EAGER_SCHEDULES[name]
        moved = sum(schedule.table[kernel](shape).bytes for kernel in schedule.later) - 2 * shape.weight
        assert moved / shape.pixels == pytest.approx(256 * codes + 4 * 5)


def test_a_kernel_takes_as_long_as_its_slowest_part():
    device = roofline.Device("round numbers", bandwidth=1e9, fp32=1e12, multiprocessors=10, clock=1e9)
    assert device.shared == 1.28e12 and device.issue == 1.28e12
    for work, bound, seconds in (
        (roofline.Work(1e6), "memory", 1e-3),
        (roofline.Work(1e6, 2e9), "fp32", 2e-3),
        (roofline.Work(1e6, 2e9, 1.28e12), "shared", 1.0),
        (roofline.Work(1e6, 2e9, 1.28e12, 2.56e12), "issue", 2.0),
    ):
        assert work.bound(device) == bound and work.seconds(device) == pytest.approx(seconds)


def test_a_call_is_the_sum_of_its_kernels():
    device, case = roofline.DEVICES["A100"], cases.CASES["denoise-gray"]
    shape = roofline.shape_of(case, 0.15)
    seconds = {name: kernel(shape).seconds(device) for name, kernel in roofline.KERNELS.items()}
    step = seconds["synthesis"] + seconds["combine"] + seconds["analysis"]
    forward = 9 * step + seconds["analysis"] + seconds["unpack"]
    assert roofline.predict(case, 0.15, device, mode="forward", iterations=10) == pytest.approx(forward)
    given = step + seconds["unpack"]
    options = {"iterations": 1, "from_zero": False}
    assert roofline.predict(case, 0.15, device, mode="forward", **options) == pytest.approx(given)
    first = seconds["synthesis"] + seconds["combine"] + seconds["correlation with r"]
    back = 10 * first + 9 * (seconds["correlation with x"] + seconds["select"]) + seconds["pack"]
    assert roofline.predict(case, 0.15, device, mode="training", iterations=10) == pytest.approx(forward + back)


def test_each_case_has_predictions_that_grow_with_the_density():
    for name, case in cases.CASES.items():
        for device in roofline.DEVICES.values():
            options = {"mode": "training", "iterations": 10}
            thin, thick = (roofline.predict(case, p, device, **options) for p in (0.03, 0.45))
            assert 0 < thin <= thick < 1, name
            assert (thin == thick) == (name in ("deep", "dense"))  # which are dense in any case
            assert roofline.predict_eager(case, 0.03, device, **options) > thin


def test_only_gpus_of_a_known_datasheet_have_a_prediction():
    assert roofline.device_named("NVIDIA A100-SXM4-80GB").bandwidth == 2039e9
    assert roofline.device_named("NVIDIA GeForce RTX 4090") is roofline.DEVICES["RTX 4090"]
    for other in ("NVIDIA A100-PCIE-40GB", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 D", "Tesla T4"):
        assert roofline.device_named(other) is None


def test_predictions_are_printed_as_such_for_every_case(capsys):
    assert program.main(["--roofline"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("PREDICTIONS, NOT MEASUREMENTS") and told.endswith("predictions, not measurements.\n")
    for name in (
        *cases.CASES,
        *(device.name for device in roofline.DEVICES.values()),
        "packed minimum",
        "eager / fused",
    ):
        assert name in told
    assert all(f"{name}: density 0.1" in told for name in cases.CASES)
    assert program.main(["--roofline", "--cases", "signal", "--densities", "0.3"]) == 0
    told = capsys.readouterr().out
    assert "signal: density 0.3 of the last code, 0.45 in the mean" in told and "deep" not in told


def test_the_document_shows_what_the_command_prints(capsys):
    text = (program.ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    command, shown = re.search(r"```\n\$ python -m benchmarks (.*)\n((?s:.*?))```", text).groups()
    assert program.main(command.split()) == 0
    assert capsys.readouterr().out == shown
