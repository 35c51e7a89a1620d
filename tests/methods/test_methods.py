"""What each method does to one block."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.blocks.architecture import linears
from apiq.blocks.problem import Problem
from apiq.blocks.walk import deploy
from apiq.grids.affine import Grid, extrema, fake_quantize, scale_and_zero
from apiq.methods import build
from apiq.methods.inputs import input_order
from apiq.params import QuantizeParams


def settings(**values):
    return QuantizeParams(**{"bits": 2, "group_size": 16, "rank": 4, "epochs": 4, "lr_adapter": 0.005, **values})


def deployed_error(problem, params):
    solution = build(params).solve(problem)
    deploy(problem.block, solution, params, torch.float32)
    return solution, problem.error(2)


def test_rtn_rounds_every_linear_to_its_own_grid(problem):
    weights = {name: linear.weight.clone() for name, linear in problem.linears().items()}
    solution = build(settings(method="rtn")).solve(problem)
    assert solution.linears.keys() == weights.keys()
    grid = Grid(2, 16, False)
    for name, W in weights.items():
        expected = fake_quantize(W, *scale_and_zero(*extrema(W, grid), grid), grid)
        assert torch.equal(solution.linears[name].dequantized(), expected)
    assert not solution.adapters


@pytest.mark.parametrize("method", ["apiq-lw", "apiq-bw"])
@pytest.mark.parametrize("lr_weight", [0, 0.02])
def test_what_was_trained_is_what_is_deployed(problem, method, lr_weight):
    params = settings(method=method, lr_weight=lr_weight)
    solution = build(params).solve(problem)
    everything = slice(0, 6)
    trained = problem.run(problem.Xq[everything], everything).detach()
    deploy(problem.block, solution, params, torch.float32)
    deployed = problem.run(problem.Xq[everything], everything).detach()
    torch.testing.assert_close(deployed, trained, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in problem.block.parameters() if parameter.dim() == 1)


@pytest.mark.parametrize("method", ["apiq-lw", "apiq-bw"])
def test_fitting_lowers_the_error_of_the_block_well_below_its_start(problem, method):
    solution, error = deployed_error(problem, settings(method=method, epochs=12))
    assert solution.start is not None
    assert error < 0.7 * solution.start


@pytest.mark.parametrize("method", ["apiq-lw", "apiq-bw"])
def test_codes_ranges_and_both_adapters_all_move(problem, method):
    still = build(settings(method=method, epochs=0)).solve(copy.deepcopy(problem))
    moved = build(settings(method=method)).solve(problem)
    for name in still.linears:
        assert not torch.equal(still.linears[name].scales, moved.linears[name].scales)
        for part in "AB":
            key = f"{name}.lora_{part}.weight"
            assert not torch.equal(still.adapters[key], moved.adapters[key])
    assert any(not torch.equal(still.linears[name].codes, moved.linears[name].codes) for name in still.linears)


def test_a_weight_that_moves_fits_better_than_one_that_stays_and_is_left_as_it_was(problem):
    errors = {}
    for rate in (0, 0.01):
        case = copy.deepcopy(problem)
        originals, before = case.linears(), copy.deepcopy(case.block.state_dict())
        _, errors[rate] = deployed_error(case, settings(method="apiq-bw", epochs=12, lr_weight=rate))
        assert all(torch.equal(linear.weight, before[f"{name}.weight"]) for name, linear in originals.items())
    assert errors[0.01] < 0.9 * errors[0]


def test_blockwise_beats_layerwise_and_rounding(problem):
    errors = {
        m: deployed_error(copy.deepcopy(problem), settings(method=m, epochs=12))[1]
        for m in ("rtn", "apiq-lw", "apiq-bw")
    }
    assert errors["apiq-bw"] < errors["apiq-lw"] < errors["rtn"]


def test_the_second_term_pulls_towards_the_map_of_the_block(problem):
    """With it, the quantized block is closer to the full-precision block on the quantized input."""
    teacher = copy.deepcopy(problem.block)
    own = problem.Xq.mapped(lambda hidden, batch: problem.call.run(teacher, hidden, batch), 2)
    distances = {}
    for term in (False, True):
        case = copy.deepcopy(problem)
        deployed_error(case, settings(method="apiq-bw", second_term=term, epochs=12))
        distances[term] = float((case.Xq.mapped(case.run, 2).rows - own.rows).square().mean())
    assert distances[True] < distances[False]


def test_one_curve_a_block_and_one_a_linear(problem):
    blockwise = build(settings(method="apiq-bw")).solve(copy.deepcopy(problem))
    layerwise = build(settings(method="apiq-lw")).solve(problem)
    assert [(curve.name, len(curve.losses)) for curve in blockwise.curves] == [("block", 5)]
    assert [curve.name.split(".")[1] for curve in layerwise.curves] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert all(curve.losses[-1] < curve.losses[0] for curve in layerwise.curves)


def test_layers_are_fitted_in_input_order(problem):
    order = input_order(problem, problem.linears())
    assert [[name.split(".")[1] for name in names] for names in order] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_bits_and_the_global_one_is_left_alone(problem):
    state = torch.get_rng_state()
    first = build(settings(method="apiq-bw")).solve(copy.deepcopy(problem))
    torch.manual_seed(123)
    second = build(settings(method="apiq-bw")).solve(problem)
    assert all(torch.equal(first.adapters[key], second.adapters[key]) for key in first.adapters)
    torch.manual_seed(0)
    torch.set_rng_state(state)
    build(settings(method="apiq-bw", epochs=0)).solve(Problem(**{**vars(problem), "block": fresh_block()}))
    assert torch.equal(torch.get_rng_state(), state)


def fresh_block():
    torch_state = torch.get_rng_state()
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    block: nn.Module = LlamaForCausalLM(config).model.layers[0]
    torch.set_rng_state(torch_state)
    assert linears(block)
    return block
