"""The decode benchmark times what it says, and refuses a machine where it would time nothing."""

import sys

import pytest
import torch

from benchmarks import decode as benchmark
from benchmarks import machine

pytest.importorskip("triton")


def test_a_row_compares_three_that_agree(monkeypatch):
    monkeypatch.setattr(machine, "TURN", 0.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = benchmark.measure(width=96, bits=3, copies=2, device=device, rounds=1)
    assert all(row["microseconds"][name] > 0 for name in ("dense", "fused", "plain"))
    assert 0 <= row["largest_relative_difference"] < 2e-2  # the interpreter cuts bfloat16 where a GPU rounds


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["decode", "--device", "cpu"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
