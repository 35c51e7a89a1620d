"""One block of a tiny Llama to be quantized."""

import contextlib
import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.blocks.activations import Activations, Home
from apiq.blocks.architecture import find_blocks
from apiq.blocks.capture import capture
from apiq.blocks.problem import Problem

HOME = Home("device", torch.device("cpu"))


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def problem(llama):
    model = copy.deepcopy(llama).requires_grad_(False)
    blocks = find_blocks(model)
    windows = torch.randint(0, 61, (6, 12), generator=torch.Generator().manual_seed(1))
    X, calls = capture(model, blocks.modules, windows, torch.float32, lambda shape: HOME)
    noise = torch.randn(X.rows.shape, generator=torch.Generator().manual_seed(2))
    Xq = Activations(X.rows + 0.05 * noise, HOME)
    problem = Problem(1, blocks.modules[0], calls[0], X, Xq, None, None, 3, contextlib.nullcontext, lambda *_: None)
    problem.targets = X.mapped(problem.run, 2)
    return problem
