"""benchmarks/profile.py: what two profilers say is added up by kernel, and told by pixel and iteration."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("skimage", reason="the benchmarks need pip install dsc_ops[examples]")
pytest.importorskip("mlxtend", reason="the benchmarks need pip install dsc_ops[examples]")

from benchmarks import cases, profile, program
from benchmarks.machine import machine


def test_samples_are_added_up_by_kernel():
    report = """# Overhead,Symbol
 40.50% ,[.] dsc::cpu::avx2::packed_analysis<float>
 5.00%  ,[.] dsc::cpu::avx512::packed_analysis_by<dsc::cpu::avx512::PairsOfPixels. float>
 4.00%  ,[.] dsc::cpu::avx512::analyze_tile<4. dsc::cpu::avx512::PairsOfPixels. false. true. float>
 0.50%  ,[.] dsc::cpu::avx512::sum_columns<float>
 3.00% ,[.] dsc::cpu::avx2::packed_backward_analysis<float>
 10.00% ,[.] dsc::cpu::avx2::SumAtomsAndGradient<float>::add<7. true>
 1.00% ,[.] dsc::cpu::avx2::DotAtoms<true. float>::run<7>
 0.75% ,[.] dsc::cpu::avx512::Sliding<float. 4. true>::subtract<true>
 0.25% ,[.] dsc::cpu::avx512::ColumnByColumn<float. Columns<float. 3. 9>. true>::subtract<false>
 5.00% ,[.] dsc::cpu::avx512::Sliding<float. 4. true>::add<true. true. true>
 2.00% ,[.] dsc::cpu::avx512::ColumnByColumn<float. Columns<float. 3. 9>. true>::add<false. true. false>
 1.00% ,[.] dsc::cpu::avx512::Sliding<float. 4. true>::add<true. false. false>
 0.50% ,[.] dsc::cpu::avx512::ColumnByColumn<float. Columns<float. 3. 9>. true>::add<true. false. false>
 10.00% ,[.] dsc::cpu::avx2::packed_to_dense<float>
 16.50% ,[k] clear_page_erms
"""
    found = profile.shares(report)
    assert found["A_W, threshold, pack"] == pytest.approx(0.5) and found["dW, dtheta, S_W"] == pytest.approx(0.2)
    assert found["dense codes in and out"] == pytest.approx(0.1) and found["the rest"] == pytest.approx(0.165)
    assert found["S_D"] == pytest.approx(0.015) and found["dD, dx"] == pytest.approx(0.02)


def test_events_are_added_up_by_kernel():
    report = """1,000,507 (100.0%)  44 (100.0%)  16 (100.0%)  8 (100.0%)  PROGRAM TOTALS

Ir                  D1mr          D1mw        Bcm          file:function
900,000 (89.96%)    40 (90.91%)   12 (75.0%)  5 (62.5%)  ???:void dsc::cpu::avx2::packed_synthesis<float>(int) [/_C.so]
100,500 (10.04%)     4 ( 9.09%)    4 (25.0%)   .           ???:void dsc::cpu::avx2::packed_synthesis<double>(int)
      7 ( 0.00%)     .             .           3 (37.5%)   ./string/../x86_64/multiarch/memset.S:__memset [/x/libc.so.6]
"""
    found = profile.counts(report)
    assert found["S_D"] == {"Ir": 1000500, "D1mr": 44, "D1mw": 16, "Bcm": 5}
    assert found["the rest"] == {"Ir": 7, "D1mr": 0, "D1mw": 0, "Bcm": 3}
    assert not any(found["dD, dx"].values())


def test_a_profile_is_by_pixel_and_iteration_and_against_the_matrix_product():
    events = {"Ir": 4000, "D1mr": 15, "D1mw": 5, "Bcm": 2}
    sampled = {"units": 100, "seconds": 1e-6, "shares": {"S_D": 0.5}}
    counted = {"units": 10, "counts": {"S_D": events}}
    (row,) = profile.rows_of("picture", 0.1, sampled, counted)
    assert row["nanoseconds"] == pytest.approx(5) and row["instructions"] == 400 and row["misses"] == 2
    assert row["mispredicted"] == pytest.approx(0.2) and row["rate"] == pytest.approx(80)
    product = row | {"case": profile.PRODUCT, "rate": 160.0}
    text = profile.page([product, row], machine(), 0.1, 10)
    assert "| picture | S_D | 50 % | 5.0 | 400 | 80.0 | 50 % | 2.0 | 0.20 |" in text


def test_a_profile_without_counts_of_instructions_has_products():
    """A step in which x_1 and x_2 have 30 and 10 non-zeros at 20 pixels, of 9 taps each."""
    case = cases.CASES["stem-cifar"].scaled(1)
    task = cases.Problem(
        case, torch.zeros(1, 1, 4, 5), torch.zeros(8, 1, 3, 3), torch.zeros(2, 8, 1, 3, 3), torch.zeros(2, 1), None,
        torch.zeros(1, 64, 4, 5), (0, 30, 10),
    )  # fmt: skip
    assert not 16 * task.signal.numel() > task.code.numel()  # or S_D would be made twice
    sampled = {"units": 40, "seconds": 8e-6, "shares": {"S_D": 0.25, "dW, dtheta, S_W": 0.5, "the rest": 0.25}}
    synthesis, sums, rest = profile.rows_of_products(task, sampled)
    assert synthesis["nanoseconds"] == pytest.approx(50) and synthesis["products"] == pytest.approx(9 * 30 / 40)
    assert sums["products"] == pytest.approx(2 * 9 * 40 / 40) and rest["products"] == 0
    assert synthesis["read"] == pytest.approx(4 * 6.75 / 50) and not synthesis["written"]
    assert sums["read"] == pytest.approx(2 * sums["written"]) == pytest.approx(2 * 4 * 9 / 100)
    product = {"case": profile.PRODUCT, "products": 1.0, "rate": 0.36}
    text = profile.page([product, synthesis, sums, rest], machine(), 0.1, 10)
    assert "| sgemm | 1024 x 1024 | 100 % | | | 0.4 | 100 % | | |" in text
    assert "| stem-cifar | dW, dtheta, S_W | 50 % | 100.0 | 18 | 0.2 | 50 % | 1 | 0 |" in text
    assert "| stem-cifar | the rest | 25 % | 50.0 | | | | | |" in text and "multiply-adds" in text


def test_a_profile_is_told_case_by_case_and_written_whole(monkeypatch, tmp_path, capsys):
    """What was measured before a kill is on the screen."""
    events = dict.fromkeys(profile.EVENTS, 1000)

    def in_child(tool, task, folder):
        if task is not None and task.case.name == "dense" and tool == "callgrind" and killed:
            raise KeyboardInterrupt
        return {"units": 10, "seconds": 1e-6, "shares": {"S_D": 1.0}, "counts": {"S_D": events}}

    monkeypatch.setattr(profile, "missing", lambda: "")
    monkeypatch.setattr(profile, "counts_instructions", lambda: True)
    monkeypatch.setattr(profile, "in_child", in_child)
    monkeypatch.setattr(program, "FIGURES", tmp_path)
    monkeypatch.setattr(cases, "CASES", {name: cases.CASES[name].scaled(1) for name in ("stem-cifar", "dense")})
    killed = True
    with pytest.raises(SystemExit, match="Interrupted: nothing was written"):
        program.main(["--profile"])
    assert "| stem-cifar | S_D | 100 % |" in capsys.readouterr().out and not list(tmp_path.iterdir())
    killed = False
    assert program.main(["--profile"]) == 0
    (page,) = tmp_path.iterdir()
    told = capsys.readouterr().out
    for line in ("| sgemm |", "| stem-cifar | S_D |", "| dense | S_D |"):
        assert line in told and line in page.read_text()


def test_profilers_that_are_not_here_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for counts, needed in ((True, "linux-perf and valgrind, which are"), (False, "linux-perf, which is")):
        monkeypatch.setattr(profile, "counts_instructions", lambda counts=counts: counts)
        with pytest.raises(SystemExit, match=f"--profile needs {needed} not here"):
            program.main(["--profile"])
