"""The engine benchmark measures what it says, at a size that takes no time."""

import pytest
import torch

from apiq.params import QuantizeParams
from benchmarks import machine
from benchmarks.engine import measure, one_block

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_compares_the_four_and_their_gradients(dtype, monkeypatch):
    monkeypatch.setattr(machine, "TURN", 0.0)
    params = QuantizeParams(recipe="paper", bits=2, group_size=32, rank=16)
    row = measure(one_block(128, 16, dtype, CPU), params, rounds=1)
    assert (row["width"], row["tokens"]) == (128, 16)
    assert all(row["seconds"][name] > 0 for name in ("engine", "reference", "floor", "forward"))
    assert row["extra_mb"]["forward"] < row["extra_mb"]["floor"] < row["extra_mb"]["reference"]
    assert row["engine_to_floor"] == pytest.approx(row["seconds"]["engine"] / row["seconds"]["floor"], rel=0.05)
    assert ("gradient_difference" in row) == (dtype == torch.float32)
    assert row.get("gradient_difference", 0.0) < 1e-5


def test_extra_memory_is_the_peak_above_what_was_there():
    there = torch.zeros(1000, 1000)

    def work():
        first = there + 1
        second = first * 2
        del first
        return (second + 1).sum()

    assert machine.extra_memory(work, CPU) == pytest.approx(2 * there.nbytes, rel=0.01)


def test_what_takes_long_is_called_once_a_round_and_what_takes_no_time_often(monkeypatch):
    monkeypatch.setattr(machine, "TURN", 0.02)
    calls = {"long": 0, "short": 0}

    def work(name, size):
        calls[name] += 1
        torch.randn(size, size) @ torch.randn(size, size)

    taken = machine.fastest({"long": lambda: work("long", 1500), "short": lambda: work("short", 8)}, CPU, 2)
    assert calls["long"] <= 4 < calls["short"]
    assert taken["short"] < taken["long"]
