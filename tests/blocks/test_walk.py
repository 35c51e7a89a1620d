"""A walk ends in a sentence, or goes on, where a number is not finite."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.blocks import walk
from apiq.blocks.store import BlockStore
from apiq.errors import ApiqError
from apiq.methods.descent import _Descent
from apiq.params import QuantizeParams
from apiq.quantization import quantize


@pytest.fixture
def quantized(tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")

    def quantized(**values):
        windows = torch.randint(0, 61, (4, 8), generator=torch.Generator().manual_seed(0))
        return quantize(tmp_path / "model", windows, QuantizeParams(group_size=16, **values), tmp_path / "out")

    return quantized


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_an_output_that_is_not_finite_is_refused(quantized, monkeypatch, error):
    monkeypatch.setattr(walk, "mean_squared_error", lambda *args: error)
    with pytest.raises(ApiqError, match=r"block 0 is not finite; set quantize\.dtype to float32"):
        quantized(method="rtn", sensitivity="none")


def test_a_loss_that_is_not_finite_on_windows_held_out_is_left_out_of_the_record(quantized, monkeypatch):
    records, losses = [], iter([math.inf, 3.0, 2.0])
    finish = BlockStore.finish
    monkeypatch.setattr(
        BlockStore, "finish", lambda self, record, seconds: records.append(record) or finish(self, record, seconds)
    )
    monkeypatch.setattr(_Descent, "_held_out", lambda self: next(losses))
    quantized(method="apiq-bw", rank=2, epochs=2, held_out=0.25)
    curves = {curve["name"]: curve["losses"] for curve in json.loads(json.dumps(records[0], allow_nan=False))["curves"]}
    assert curves["block held out"] == [None, 3.0, 2.0]
    assert len(curves["block"]) == 3 and all(map(math.isfinite, curves["block"]))
