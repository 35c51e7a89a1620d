"""Activations are the same wherever they live, and survive on disk."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from apiq import ram
from apiq.blocks.activations import Activations, Home, choose_home
from apiq.blocks.store import BlockStore, write_rows
from apiq.errors import ApiqError

CPU = torch.device("cpu")


def homes(folder):
    return [Home("device", CPU), Home("memory", CPU), Home("disk", CPU, folder)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_home_keeps_what_it_was_given(tmp_path, dtype):
    value = torch.randn(5, 3, 4).to(dtype)
    for home in homes(tmp_path):
        rows = Activations.empty((5, 3, 4), dtype, home)
        rows[slice(0, 5)] = value
        assert torch.equal(rows[slice(1, 4)], value[1:4])
        assert torch.equal(rows.mapped(lambda x, batch: -x, 2).rows, -value)


def test_files_of_activations_leave_no_name_behind(tmp_path):
    rows = Activations.empty((2, 3, 4), torch.float32, Home("disk", CPU, tmp_path))
    assert list(tmp_path.iterdir()) == []
    rows[slice(0, 2)] = torch.ones(2, 3, 4)
    assert float(rows.rows.sum()) == 24


def test_a_file_has_no_name_any_more_when_it_takes_room(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "posix_fallocate", lambda handle, *_: seen.append((list(tmp_path.iterdir()), handle)))
    Activations.empty((2, 3, 4), torch.float32, Home("disk", CPU, tmp_path))
    assert [left for left, _ in seen] == [[]]


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Activations.empty((2, 3, 4), torch.float32, Home("disk", CPU, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_activations_that_fill_the_memory_go_to_disk(tmp_path):
    small, huge = (4, 8, 16), (1 << 20, 1 << 10, 1 << 12)
    assert choose_home("auto", small, torch.float32, 5, CPU, tmp_path).kind == "device"
    assert choose_home("auto", huge, torch.float32, 5, CPU, tmp_path).kind == "disk"
    assert choose_home("disk", small, torch.float32, 5, CPU, tmp_path).kind == "disk"


def test_the_memory_is_that_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(ram, "bounds", lambda root: [ram.Bound(1000, 0)])
    assert choose_home("auto", (125,), torch.float32, 1, CPU, tmp_path).kind == "device"
    assert choose_home("auto", (126,), torch.float32, 1, CPU, tmp_path).kind == "disk"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_written_a_few_at_a_time_are_safetensors(tmp_path, dtype):
    X, Xq = torch.randn(11, 3, 4).to(dtype), torch.randn(11, 3, 4).to(dtype)
    home = Home("device", CPU)
    write_rows(tmp_path / "rows", {"X": Activations(X, home), "Xq": Activations(Xq, home)})
    read = load_file(tmp_path / "rows")
    assert torch.equal(read["X"], X) and torch.equal(read["Xq"], Xq)


def test_the_store_gives_back_what_it_was_given_to_any_home(tmp_path):
    X, Xq = torch.randn(9, 3, 4), torch.randn(9, 3, 4)
    store = BlockStore(tmp_path)
    store.save_activations(1, *(Activations(rows, Home("device", CPU)) for rows in (X, Xq)))
    for home in homes(tmp_path):
        again = store.activations(1, home)
        assert torch.equal(again[0].rows, X) and torch.equal(again[1].rows, Xq)


def test_damaged_activations_are_refused_with_the_way_out(tmp_path):
    store = BlockStore(tmp_path)
    rows = Activations(torch.randn(9, 3, 4), Home("device", CPU))
    store.save_activations(1, rows, rows)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ApiqError, match=r"is damaged .* delete it and start again"):
        store.activations(1, Home("device", CPU))
