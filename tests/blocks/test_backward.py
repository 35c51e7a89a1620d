"""Gradients that are taken block by block are those of the whole model."""

import contextlib

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from apiq.blocks.activations import Home
from apiq.blocks.backward import squared_gradients
from apiq.blocks.capture import PADDING, capture
from apiq.blocks.survey import Whole
from apiq.checkpoint.loading import full_precision
from apiq.errors import ApiqError

CPU = torch.device("cpu")
SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def whole(folder, windows, tmp_path):
    stream = full_precision(folder, torch.float32).stream
    with stream.embeddings(CPU) as model:
        X, calls = capture(model, stream.blocks.modules, windows, torch.float32, lambda shape: Home("device", CPU))
    return Whole(stream, windows, X, calls, CPU, "auto", tmp_path, contextlib.nullcontext, lambda what, index: None)


@pytest.mark.parametrize("padded", [False, True])
def test_the_fisher_information_is_that_of_the_whole_model(tmp_path, padded):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True)
    folder = saved(LlamaForCausalLM(config), tmp_path / "model")
    windows = torch.randint(0, 37, (3, 10))
    if padded:
        windows[1, 7:] = PADDING
    found = {
        f"model.layers.{index}.{name}": square
        for index, _, squares in squared_gradients(whole(folder, windows, tmp_path))
        for name, square in squares.items()
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = {name: torch.zeros_like(model.get_submodule(name).weight) for name in found}
    for window in windows:
        tokens = window[window != PADDING]
        model.zero_grad()
        logits = model(input_ids=tokens[None]).logits
        F.cross_entropy(logits[0, :-1], tokens[1:], reduction="sum").backward()
        for name, total in expected.items():
            total += model.get_submodule(name).weight.grad.square() / len(windows)
    assert len(found) == 3 * 7
    for name, square in found.items():
        torch.testing.assert_close(square, expected[name], rtol=1e-3, atol=1e-5)


def test_a_model_without_a_next_token_is_refused(tmp_path):
    config = BertConfig(**SIZES, architectures=["BertForMaskedLM"])
    folder = saved(BertForMaskedLM(config), tmp_path / "model")
    with pytest.raises(ApiqError, match=r"does not predict the next token.*quantize\.sensitivity, or .* to none"):
        next(squared_gradients(whole(folder, torch.randint(0, 37, (1, 8)), tmp_path)))
