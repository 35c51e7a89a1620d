"""OmniQuant learns ranges and factors, and what it deploys computes what it fitted."""

import copy

import pytest
import torch
from torch import nn

from apiq.blocks.walk import deploy
from apiq.grids.affine import Grid
from apiq.methods import build, omniquant
from apiq.methods.omniquant import TransformedLinear
from apiq.params import QuantizeParams


def settings(**values):
    return QuantizeParams(
        **{"method": "omniquant", "bits": 2, "group_size": 16, "batch_size": 2, "epochs": 8, **values}
    )


def deployed(problem, **values):
    case, params = copy.deepcopy(problem), settings(**values)
    solution = build(params).solve(case)
    deploy(case.block, solution, params, torch.float32)
    return solution, case


@pytest.mark.parametrize("transform", [False, True])
def test_what_was_fitted_is_what_is_deployed(problem, monkeypatch, transform):
    fitted, unwrap = [], omniquant._unwrap

    def keep(problem, *rest):
        fitted.append(problem.run(problem.Xq[slice(0, 6)], slice(0, 6)).detach())
        return unwrap(problem, *rest)

    monkeypatch.setattr(omniquant, "_unwrap", keep)
    solution, case = deployed(problem, omniquant={"transform": transform, "lr_transform": 0.05})
    after = case.run(case.Xq[slice(0, 6)], slice(0, 6))
    torch.testing.assert_close(after, fitted[0], rtol=1e-3, atol=1e-3)
    assert bool(solution.others) == transform


def test_fitting_lowers_the_error_and_the_transformation_lowers_it_more(problem):
    errors = {}
    for transform in (False, True):
        rates = {"lr_theta": 0.05, "decay_theta": 0.0, "omniquant": {"transform": transform, "lr_transform": 0.02}}
        solution, case = deployed(problem, epochs=15, **rates)
        errors[transform] = case.error(2)
        assert errors[transform] < 0.95 * solution.start
        assert len(solution.curves[0].losses) == 16
    assert errors[True] < errors[False]


def test_ranges_and_factors_all_move(problem, monkeypatch):
    made = []
    wrap = omniquant._wrap
    monkeypatch.setattr(omniquant, "_wrap", lambda *args: made.append(wrap(*args)) or made[0])
    deployed(problem, epochs=2)
    fakes, logs = made[0]
    assert all(bool((log != 0).any()) for log in logs) and len(logs) >= 3
    for fake in fakes.values():
        assert bool((fake.gamma != omniquant.START).any()) and bool((fake.beta != omniquant.START).any())


@pytest.mark.parametrize("symmetric", [False, True, "balanced"])
def test_the_transformed_weight_is_quantized_between_its_factors(symmetric):
    torch.manual_seed(0)
    linear, grid = nn.Linear(20, 6), Grid(8, 5, symmetric)
    reads, writes = nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(6))
    fake = TransformedLinear(linear, grid, reads, writes)
    expected = linear.weight * reads.exp() / writes.exp().unsqueeze(-1)
    torch.testing.assert_close(fake.transformed(), expected)
    assert bool(((fake.weight - linear.weight).abs() < 0.1 * linear.weight.abs().max()).all())
    folded = nn.Linear(20, 6)
    folded.weight = nn.Parameter(expected.detach())
    Q = fake.packed(folded).dequantized()
    torch.testing.assert_close(Q * writes.exp().unsqueeze(-1) / reads.exp(), fake.weight)
