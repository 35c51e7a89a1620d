"""A full-precision model that does not fit its device gives the same numbers from RAM and disk."""

import gc
from pathlib import Path

import pytest
import torch

from apiq.checkpoint import spreading
from apiq.checkpoint.loading import load
from apiq.evaluation.perplexity import perplexity


def test_a_model_that_does_not_fit_is_spread_and_gives_the_same_numbers(original, windows, monkeypatch, tmp_path):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path))
    whole = load(original, device="cpu")
    assert not hasattr(whole.model, "hf_device_map")
    size = sum(path.stat().st_size for path in Path(original).glob("*.safetensors"))
    monkeypatch.setattr(spreading, "free_ram", lambda: 0.95 * size / spreading.SHARE)
    spread = load(original, device="cpu")
    assert set(spread.model.hf_device_map.values()) == {"cpu", "disk"}
    assert perplexity(spread.model, windows, 2) == perplexity(whole.model, windows, 2)
    assert any(tmp_path.glob("spread.*"))
    del spread
    gc.collect()
    assert not any(tmp_path.glob("spread.*"))


@pytest.mark.parametrize(("free", "placed"), [(1000, {}), (999, {"device_map": "auto"})])
def test_gpu_memory_counts_before_ram(tmp_path, monkeypatch, free, placed):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 400)
    monkeypatch.setattr(spreading, "free_ram", lambda: 10**6)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    monkeypatch.setenv("APIQ_WORK", str(tmp_path))
    found = spreading.spread([tmp_path / "model.safetensors"], torch.float16, torch.float32, torch.device("cuda:1"))
    assert {**found, "max_memory": None, "offload_folder": None} == {
        **placed,
        "max_memory": None,
        "offload_folder": None,
    }
    assert not placed or found["max_memory"] == {1: 799, "cpu": 800_000}
