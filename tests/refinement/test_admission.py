"""What cannot be refined is refused before anything is computed, and the sentence says what to do."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from apiq.checkpoint import manifest
from apiq.errors import ApiqError
from apiq.params import QuantizeParams, RefineParams
from apiq.quantization import quantize
from apiq.refinement.run import refine


def refused(folder, original, windows, out, **values):
    """The sentence; nothing was reported before it."""
    steps = []
    with pytest.raises(ApiqError) as caught:
        refine(folder, original, windows, RefineParams(**{"epochs": 1, "batch_size": 2, **values}), out, steps.append)
    assert not steps and not out.exists()
    return str(caught.value)


@pytest.fixture
def encoder(tmp_path, windows, work):
    """Quantize a tiny BERT with a head of some kind; the original and the quantized folder."""

    def encoder(kind):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, initializer_range=0.2,
        )  # fmt: skip
        kind(config).save_pretrained(tmp_path / "bert")
        params = QuantizeParams(bits=2, group_size=16, rank=4, epochs=1)
        quantize(tmp_path / "bert", windows, params, tmp_path / "quantized")
        return tmp_path / "bert", tmp_path / "quantized"

    return encoder


def test_nothing_to_train(make, original, windows, tmp_path, work):
    sentence = refused(make(method="rtn"), original, windows, tmp_path / "out")
    assert "neither adapters nor scales" in sentence and "set refine.lr_scales" in sentence
    folder = make(method="qlora", bits=4, adapter="none")
    assert "stored in 8 bits" in refused(folder, original, windows, tmp_path / "out", lr_scales=0.01)


def test_scales_under_an_adapter_that_hangs_on_the_weight(make, original, windows, tmp_path, work):
    sentence = refused(make(adapter="psoft"), original, windows, tmp_path / "out", lr_scales=0.001)
    assert "refine.lr_scales is 0.001" in sentence and "psoft" in sentence and "set it to 0" in sentence


def test_a_finetuned_folder(original, windows, tmp_path, work):
    (tmp_path / "tuned").mkdir()
    manifest.write(tmp_path / "tuned", "finetuned", base="../quantized")
    sentence = refused(tmp_path / "tuned", original, windows, tmp_path / "out")
    assert "is finetuned" in sentence and "give the quantized folder, here ../quantized" in sentence


def test_an_encoder_generates_nothing_but_is_refined_on_the_windows(encoder, windows, tmp_path):
    original, quantized = encoder(BertForMaskedLM)
    assert "BertForMaskedLM cannot generate" in refused(quantized, original, windows, tmp_path / "out")
    params = RefineParams(epochs=3, batch_size=2, generated=0, lr_adapter=0.01)
    found = refine(quantized, original, windows, params, tmp_path / "out")
    assert found["loss_last"] < found["loss_first"]


def test_a_classifier_predicts_no_tokens(encoder, windows, tmp_path):
    original, quantized = encoder(BertForSequenceClassification)
    sentence = refused(quantized, original, windows, tmp_path / "out", generated=0, hidden_weight=0.0)
    assert "BertForSequenceClassification gives logits of shape (1, 2)" in sentence


def test_padding_is_no_token(make, original, windows, tmp_path, work):
    padded = windows.clone()
    padded[0, 12:] = -100
    assert "the windows hold -100" in refused(make(), original, padded, tmp_path / "out")


def test_several_processes(make, original, windows, tmp_path, work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused(make(), original, windows, tmp_path / "out")
