"""What can take a factor is found in blocks of many families, and transforming it leaves the block's output."""

import contextlib

import pytest
import torch
import transformers as hf

from apiq.blocks.activations import Home
from apiq.blocks.architecture import find_blocks
from apiq.blocks.capture import capture
from apiq.blocks.problem import Problem
from apiq.blocks.unfuse import unfuse
from apiq.blocks.walk import deploy
from apiq.methods import build
from apiq.methods.equivalent import pairs, put, transformed
from apiq.methods.inputs import counting
from apiq.params import QuantizeParams
from tests.families.zoo import DECODERS, ENCODERS

HOME = Home("device", torch.device("cpu"))
FOUND = {
    "llama": {"input_layernorm": "qkv", "post_attention_layernorm": "gu", "up_proj": "d"},
    "gemma2": {"input_layernorm": "qkv", "pre_feedforward_layernorm": "gu", "up_proj": "d"},
    "opt": {"self_attn_layer_norm": "qkv", "v_proj": "o", "final_layer_norm": "f", "fc1": "f"},
    "phi3": {"input_layernorm": "q", "post_attention_layernorm": "g"},
    "gpt2": {"ln_1": "c", "ln_2": "c"},
    "mixtral": {"input_layernorm": "qkv"},
    "bert": {"value": "d"},
}


def problem_of(family):
    member = {**DECODERS, **ENCODERS}[family]
    torch.manual_seed(0)
    model = getattr(hf, member.head)(member.config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms that have learnt something
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return problem_in(model, torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(1)))


def problem_in(model, windows):
    """The first block of a model."""
    blocks = find_blocks(model)
    X, calls = capture(model, blocks.modules, windows, torch.float32, lambda shape: HOME)
    block = unfuse(blocks.modules[0]).requires_grad_(False)
    problem = Problem(0, block, calls[0], X, X, None, None, 0, contextlib.nullcontext, lambda *_: None)
    problem.targets = X.mapped(problem.run, 4)
    return problem


@pytest.mark.parametrize("family", FOUND)
def test_pairs_are_found_and_change_nothing_whatever_the_factors(family):
    problem, everything = problem_of(family), slice(0, 2)
    before = problem.run(problem.X[everything], everything)
    found = pairs(problem)
    assert torch.equal(problem.run(problem.X[everything], everything), before)
    written = {pair.writer.rpartition(".")[2]: "".join(n.rpartition(".")[2][0] for n in pair.readers) for pair in found}
    assert written == FOUND[family]
    for number, pair in enumerate(found):
        width = problem.block.get_submodule(pair.readers[0]).in_features
        c = torch.rand(width, generator=torch.Generator().manual_seed(number)) + 0.3
        put(problem.block, transformed(problem.block, pair, c))
        changed = problem.run(problem.X[everything], everything)
        torch.testing.assert_close(changed, before, rtol=1e-4, atol=1e-5)


def test_what_is_put_back_is_what_was_there():
    problem = problem_of("llama")
    (pair, *_) = pairs(problem)
    before = {name: value.clone() for name, value in problem.block.state_dict().items()}
    old = put(problem.block, transformed(problem.block, pair, torch.full((32,), 3.0)))
    changed = {n for n, value in problem.block.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == set(old) == {f"{name}.weight" for name in (pair.writer, *pair.readers)}
    put(problem.block, old)
    assert all(torch.equal(value, before[name]) for name, value in problem.block.state_dict().items())


def sparse_problem():
    """16 experts of which each token reaches two, so that a window of six leaves some without a token."""
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_experts=16,
        num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = hf.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    return problem_in(model, torch.randint(0, 61, (24, 6), generator=torch.Generator().manual_seed(1)))


def test_experts_that_the_first_window_leaves_out_are_in_no_pair():
    problem = sparse_problem()
    names = [name for name in problem.linears() if ".experts." in name]
    with counting(problem.block, names) as tokens:
        problem.run(problem.X[slice(0, 1)], slice(0, 1))
    assert sum(not count for count in tokens.values()) > 4
    assert [(pair.writer, len(pair.readers)) for pair in pairs(problem)] == [("input_layernorm", 3)]


def test_at_many_bits_a_mixture_of_experts_loses_nothing_by_factors():
    """By the median over tokens: rounding sends a few of them to other experts, by chance."""
    errors = {}
    for method in ("awq", "rtn"):
        problem, params = sparse_problem(), QuantizeParams(method=method, bits=8, group_size=16, batch_size=4)
        deploy(problem.block, build(params).solve(problem), params, torch.float32)
        output = problem.X.mapped(problem.run, 4).rows
        errors[method] = float((output - problem.targets.rows).square().mean(-1).median())
    assert errors["awq"] < 1.1 * errors["rtn"]
