"""Tied tensors: read by whichever name the files hold, and refused where they are not tied in the files."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from apiq.checkpoint.loading import full_precision, load
from apiq.errors import ApiqError
from apiq.params import QuantizeParams
from apiq.quantization import quantize

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """A model whose config.json ties its head to its embeddings."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def change(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def only_the_head(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def both(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def two_that_differ(tensors):
    tensors[HEAD] = tensors[EMBEDDING] + 1


@pytest.mark.parametrize("held", [only_the_head, both])
def test_a_tied_tensor_is_read_by_either_name(folder, tmp_path, monkeypatch, held):
    change(folder, held)
    theirs = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    with full_precision(folder).stream.rest() as model:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, theirs)
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    quantize(folder, None, QuantizeParams(method="rtn", bits=8, group_size=16), tmp_path / "quantized")
    model = load(tmp_path / "quantized", device="cpu").model
    assert torch.equal(model.lm_head.weight, theirs)
    assert torch.equal(model.model.embed_tokens.weight, theirs)


def test_tensors_that_are_tied_by_name_only_are_refused(folder):
    change(folder, two_that_differ)
    with pytest.raises(ApiqError, match=r"lm_head.weight in .* differs from model.embed_tokens.weight.* to false"):
        full_precision(folder)
