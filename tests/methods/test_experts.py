"""A mixture of experts: some get few tokens, one gets none."""

import contextlib

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from apiq.blocks.activations import Activations, Home
from apiq.blocks.architecture import find_blocks
from apiq.blocks.capture import capture
from apiq.blocks.problem import Problem
from apiq.blocks.unfuse import unfuse
from apiq.blocks.walk import deploy
from apiq.grids.affine import Grid, extrema, fake_quantize, scale_and_zero
from apiq.methods import build
from apiq.methods.inputs import counting, inputs
from apiq.methods.moments import moments
from apiq.params import QuantizeParams

HOME = Home("device", torch.device("cpu"))
UNREACHED = ["mlp.experts.4.gate_up_proj", "mlp.experts.4.down_proj"]


def problem_of(experts):
    """A block of a tiny Mixtral with so many experts, two of them for each token."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_local_experts=experts, num_experts_per_tok=2,
        initializer_range=0.2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    blocks = find_blocks(model)
    windows = torch.randint(0, 61, (6, 12), generator=torch.Generator().manual_seed(1))
    X, calls = capture(model, blocks.modules, windows, torch.float32, lambda shape: HOME)
    noise = torch.randn(X.rows.shape, generator=torch.Generator().manual_seed(2))
    Xq = Activations(X.rows + 0.05 * noise, HOME)
    block = unfuse(blocks.modules[0])
    problem = Problem(1, block, calls[0], X, Xq, None, None, 3, contextlib.nullcontext, lambda *_: None)
    problem.targets = X.mapped(problem.run)
    return problem


@pytest.fixture
def problem():
    problem = problem_of(experts=5)
    direction = torch.randn(32)
    # whatever a token is, two of the first four are chosen before the fifth
    problem.block.mlp.gate.weight.copy_(
        torch.stack([direction, 2 * direction, -direction, -2 * direction, 0 * direction])
    )
    problem.targets = problem.X.mapped(problem.run)
    return problem


@pytest.mark.parametrize("method", ["apiq-lw", "apiq-bw"])
@pytest.mark.parametrize("more", [{}, {"shuffle": True, "batch_size": 2}])
def test_an_expert_without_tokens_is_reported_and_fitted_to_its_weight(problem, method, more):
    weights = {name: linear.weight.clone() for name, linear in problem.linears().items()}
    few = {"recipe": "paper", "group_size": 16, "rank": 4, "epochs": 8, "lr_adapter": 0.005, "second_term": False}
    params = QuantizeParams(**{"method": method, **few, **more})
    solution = build(params).solve(problem)
    assert solution.unreached == UNREACHED
    assert solution.linears.keys() == weights.keys()
    grid = Grid(2, 16, False)
    for name in UNREACHED:
        W = weights[name]
        rounded = fake_quantize(W, *scale_and_zero(*extrema(W, grid), grid), grid)
        assert (solution.linears[name].dequantized() - W).square().sum() < 0.9 * (rounded - W).square().sum()
        assert not solution.adapters[f"{name}.lora_B.weight"].any()
    assert all(solution.adapters[f"{name}.lora_B.weight"].any() for name in weights if name not in UNREACHED)
    deploy(problem.block, solution, params, torch.float32)
    assert problem.error() < 0.7 * solution.start


def test_layer_by_layer_every_expert_with_tokens_has_a_falling_curve(problem):
    params = QuantizeParams(method="apiq-lw", group_size=16, rank=4, epochs=6, lr_adapter=0.005)
    names = problem.linears().keys()
    solution = build(params).solve(problem)
    curves = {curve.name: curve.losses for curve in solution.curves}
    assert curves.keys() == names - set(UNREACHED)
    assert all(losses[-1] < losses[0] for losses in curves.values())


def test_an_expert_with_every_token_is_fed_them_in_their_order():
    """So that what it is fed in two models belongs together, token by token, and padding is where it was."""
    problem = problem_of(experts=2)
    norm, everything = problem.block.post_attention_layernorm, slice(0, 6)
    caught = []
    norm.register_forward_hook(lambda module, args, output: caught.append(output))
    problem.run(problem.Xq[everything], everything)
    for number in range(2):
        fed = inputs(problem, problem.Xq, problem.block.mlp.experts[number].gate_up_proj)
        assert torch.equal(fed.rows, caught[0])


def test_the_closed_form_serves_an_expert_with_every_token_like_a_dense_linear():
    problem = problem_of(experts=2)
    problem.counted = torch.rand(6, 12, generator=torch.Generator().manual_seed(4)) < 0.7
    for name in ("gate_up_proj", "down_proj"):
        found = moments(problem, problem.linears(), f"mlp.experts.1.{name}", 4, paired=True)
        X, Xq = (
            inputs(problem, hidden, problem.block.get_submodule(f"mlp.experts.1.{name}")).rows[problem.counted]
            for hidden in (problem.X, problem.Xq)
        )
        assert (X - Xq).norm() < 0.5 * X.norm()  # 0.9 for X and Xq of different tokens
        torch.testing.assert_close(found.G, Xq.t() @ Xq / len(Xq))
        torch.testing.assert_close(found.M, Xq.t() @ X / len(Xq))


@pytest.mark.parametrize("method", ["closed-form", "apiq-lw"])
def test_an_expert_with_every_token_in_one_model_only_is_fitted_to_what_it_gets_there(method):
    problem = problem_of(experts=2)
    problem.Xq = Activations(problem.X.rows[:1, :1].expand(problem.X.rows.shape).contiguous(), HOME)
    caught = []
    problem.block.post_attention_layernorm.register_forward_hook(lambda module, args, output: caught.append(output))
    problem.run(problem.Xq[slice(0, 1)], slice(0, 1))
    gate = problem.block.mlp.gate
    gate.top_k = 1
    gate.weight.copy_(torch.stack([0 * caught[0][0, 0], caught[0][0, 0]]))  # tokens go where this one goes, or do not
    with counting(problem.block, ["mlp.experts.1.down_proj"]) as tokens:
        problem.X.mapped(problem.run)
    assert 0 < tokens["mlp.experts.1.down_proj"] < 6 * 12
    problem.targets = problem.X.mapped(problem.run)
    params = QuantizeParams(method=method, group_size=16, rank=4, epochs=1)
    solution = build(params).solve(problem)
    assert len(solution.unreached) == 2
    assert all(value.isfinite().all() for value in solution.adapters.values())
