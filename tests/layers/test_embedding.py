"""A narrow embedding returns what the wide one did."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from apiq.layers.embedding import keep_narrow

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.arange(12).view(2, 6)


def llama(stored, tied=False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied))
    return model.to(stored).to(torch.float32).eval()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_what_16_bits_hold_is_kept_in_them_and_read_as_before(stored):
    model = llama(stored)
    before = model(IDS).logits
    keep_narrow(model)
    assert model.get_input_embeddings().weight.dtype == stored
    assert model.get_input_embeddings()(IDS).dtype == torch.float32
    assert torch.equal(model(IDS).logits, before)


def test_gradients_flow_from_what_is_looked_up():
    model = llama(torch.bfloat16)
    keep_narrow(model)
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(IDS).requires_grad


@pytest.mark.parametrize("change", ["wider numbers", "tied", "scaled", "narrow arithmetic"])
def test_other_embeddings_are_left_alone(change):
    model = llama(torch.float32 if change == "wider numbers" else torch.bfloat16, tied=change == "tied")
    if change == "scaled":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False))
    if change == "narrow arithmetic":
        model = model.to(torch.bfloat16)
    weight = model.get_input_embeddings().weight
    keep_narrow(model)
    assert model.get_input_embeddings().weight is weight
    assert isinstance(model.get_input_embeddings(), nn.Embedding) and not model.get_input_embeddings()._forward_hooks
