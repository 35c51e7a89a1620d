"""Blocks are found, and driven one after another they are the model, whatever its family."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from apiq.blocks.activations import Activations, batches, mean_squared_error
from apiq.blocks.architecture import find_blocks, linears, replace
from apiq.blocks.capture import capture
from apiq.errors import ApiqError

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig(**COMMON), 7),
    "mistral": (MistralConfig(**COMMON, sliding_window=8), 7),
    "qwen2": (Qwen2Config(**COMMON), 7),
    "qwen3": (Qwen3Config(**COMMON, head_dim=8), 7),
    "gemma2": (Gemma2Config(**COMMON, head_dim=8, sliding_window=8), 7),
    "phi3": (Phi3Config(**COMMON), 4),
    "opt": (OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
                      max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0), 6),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_driven_one_by_one_equal_the_model_bit_for_bit(family):
    config, count = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config).eval()
    blocks = find_blocks(model)
    assert len(blocks.modules) == 3
    assert len(linears(blocks.modules[0])) == count
    windows = torch.randint(0, 61, (5, 24))
    expected = model(windows, output_hidden_states=True).hidden_states
    X, calls = capture(model, blocks.modules, windows, CPU, torch.float32, 5)
    assert torch.equal(X.rows, expected[0])
    for index, (block, call) in enumerate(zip(blocks.modules, calls, strict=True)):
        X = X.mapped(lambda hidden, block=block, call=call: call.run(block, hidden), batch_size=5)
        if index + 1 < len(blocks.modules):  # the last hidden state that the model returns is behind the norm
            assert torch.equal(X.rows, expected[index + 1])


def test_capture_leaves_the_model_as_it_was():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"][0]).eval()
    windows = torch.randint(0, 61, (2, 8))
    before = model(windows).logits
    capture(model, find_blocks(model).modules, windows, CPU, torch.float32, 5)
    assert torch.equal(model(windows).logits, before)


def test_a_model_without_blocks_is_refused_with_what_was_looked_for():
    with pytest.raises(ApiqError, match=r"no transformer blocks .* nn.ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(3, 3)))


def test_the_list_with_the_most_weights_is_chosen():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    assert find_blocks(Model()).path == "layers"


def test_replace_reaches_into_a_block():
    block = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
    replace(block, "0.0", nn.Linear(2, 5))
    assert block[0][0].out_features == 5


def test_batches_cover_everything_once():
    assert [list(range(10))[s] for s in batches(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_activations_are_handed_out_and_taken_back():
    rows = Activations.empty((4, 2, 3), torch.float32, CPU, CPU)
    rows[slice(0, 4)] = torch.arange(24.0).reshape(4, 2, 3)
    doubled = rows.mapped(lambda x: 2 * x, 3)
    assert torch.equal(doubled.rows, 2 * rows.rows)
    assert torch.equal(doubled[slice(1, 2)], 2 * rows[slice(1, 2)])


def test_the_mean_squared_error_does_not_depend_on_the_batches():
    targets = Activations(torch.randn(5, 2, 3), CPU)
    outputs = torch.randn(5, 2, 3)
    expected = torch.nn.functional.mse_loss(outputs.double(), targets.rows.double()).item()
    for size in (1, 2, 5):
        assert mean_squared_error(lambda batch: outputs[batch], targets, size) == pytest.approx(expected, rel=1e-6)
