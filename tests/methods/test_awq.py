"""AWQ never loses by its searches, folds its factors into the block exactly, and clips where nothing can take them."""

import copy

import pytest
import torch
from torch import nn

from apiq.blocks.walk import deploy
from apiq.grids.affine import Grid, extrema, fake_quantize, scale_and_zero
from apiq.methods import awq, build
from apiq.methods.awq import best_factors, factors
from apiq.methods.equivalent import pairs
from apiq.methods.moments import moments
from apiq.params import QuantizeParams


def settings(**values):
    return QuantizeParams(**{"method": "awq", "bits": 3, "group_size": 16, "batch_size": 4, **values})


def error(problem, **values):
    case, params = copy.deepcopy(problem), settings(**values)
    deploy(case.block, build(params).solve(case), params, torch.float32)
    return case.error(2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_than_rounding_to_nearest(problem, bits):
    assert error(problem, bits=bits) < error(problem, method="rtn", bits=bits)


def test_factors_are_the_best_of_the_exponents_by_brute_force(problem):
    grid = Grid(3, 16, False)
    problem.block.input_layernorm.weight.data[:4] *= 8  # channels that carry much
    pair = next(pair for pair in pairs(problem) if pair.kind == "norm")
    found = moments(problem, problem.linears(), pair.readers[0], 4)
    caught = []
    problem.block.get_submodule(pair.readers[0]).register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    problem.run(problem.Xq[slice(0, 6)], slice(0, 6))
    X = caught[0].flatten(0, 1)

    def cost(c):
        total = 0.0
        for name in pair.readers:
            W = problem.block.get_parameter(f"{name}.weight")
            Q = fake_quantize(W * c, *scale_and_zero(*extrema(W * c, grid), grid), grid) / c
            total += float((X @ (W - Q).t()).square().sum())
        return total

    tried = [cost(factors(X.abs().mean(0), exponent)) for exponent in awq.EXPONENTS]
    assert cost(best_factors(problem, pair, found, grid)) == pytest.approx(min(tried), rel=1e-4)
    assert min(tried) < 0.8 * tried[0]  # exponent 0 leaves the weights alone


def test_at_many_bits_the_deployed_block_is_the_full_precision_one(problem):
    """The factors are in the norms and in the weights, and cancel."""
    before = {name: value.clone() for name, value in problem.block.named_parameters()}
    params = settings(bits=8, group_size=4)
    solution = build(params).solve(problem)
    assert solution.others.keys() == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert any(not torch.equal(solution.others[name], before[name]) for name in solution.others)
    deploy(problem.block, solution, params, torch.float32)
    for name, value in solution.others.items():
        assert torch.equal(problem.block.get_parameter(name), value)
    output = problem.run(problem.X[slice(0, 6)], slice(0, 6))
    assert (output - problem.targets.rows).norm() < 0.01 * problem.targets.rows.norm()


def test_without_anything_that_takes_factors_ranges_are_clipped_only(problem):
    class Doubled(nn.Module):
        """A norm whose output is not what the linears read."""

        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, hidden):
            return self.norm(hidden).tanh()

    problem.block.input_layernorm = Doubled(problem.block.input_layernorm)
    problem.block.post_attention_layernorm = Doubled(problem.block.post_attention_layernorm)
    problem.targets = problem.X.mapped(problem.run, 2)
    assert {pair.kind for pair in pairs(problem)} == {"linear"}
    case = copy.deepcopy(problem)
    solution = build(settings()).solve(case)
    assert not solution.others
    assert error(problem) < error(problem, method="rtn")
