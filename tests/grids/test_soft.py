"""The staircase between identity and rounding, and its gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.grids.affine import Grid, extrema, fake_quantize, grouped, scale_and_zero, ungrouped
from apiq.grids.levels import TERNARY
from apiq.grids.soft import soft_quantize, staircase

GRIDS = [Grid(2, 8, False), Grid(3, 7, True), Grid(2, 0, False), Grid(1, 5, False)]
GRIDS += [Grid(2, 8, "balanced"), Grid(1, 5, "balanced"), Grid(TERNARY, 5, True)]


def case(grid, seed=0):
    W = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = extrema(W, grid)
    s, z = scale_and_zero(0.7 * low, 0.7 * high, grid)  # so that some codes are clamped
    return W, s.double(), z


def plainly(W, s, z, grid, temperature):
    """The same function in operations that autograd differentiates itself."""
    u = grouped(W, grid) / s.unsqueeze(-1)
    middle = u.detach().round() if grid.balanced else u.detach().floor() + 0.5
    steps = middle + torch.tanh((u - middle) / temperature) / (2 * math.tanh(0.5 / temperature))
    codes = (steps + z.unsqueeze(-1)).clamp(0, grid.top)
    return ungrouped((codes - z.unsqueeze(-1)) * s.unsqueeze(-1), W.shape[1])


@given(st.floats(-20, 20), st.floats(0.02, 5))
def test_it_rises_through_every_whole_number_and_half(u, temperature):
    edges = torch.tensor([u // 1, u // 1 + 0.5], dtype=torch.float64)
    torch.testing.assert_close(staircase(edges, temperature)[0], edges, rtol=0, atol=1e-9)
    value, slope = staircase(torch.tensor(u, dtype=torch.float64), temperature)
    assert u // 1 - 1e-9 <= value <= u // 1 + 1 + 1e-9
    assert slope >= 0


@given(st.floats(-20, 20), st.floats(0.02, 5))
def test_the_stairs_of_the_balanced_grid_lie_half_a_step_off(u, temperature):
    u = torch.tensor(u, dtype=torch.float64)
    value, slope = staircase(u, temperature, balanced=True)
    shifted, steepness = staircase(u - 0.5, temperature)
    if abs(float(u - u.round())) < 0.49:  # where u - 1/2 lies on the same stair
        torch.testing.assert_close(value, shifted + 0.5, rtol=0, atol=1e-9)
        torch.testing.assert_close(slope, steepness, rtol=0, atol=1e-9)


def test_it_lies_between_the_identity_and_rounding():
    u = torch.linspace(-3, 3, 601, dtype=torch.float64)[torch.arange(601) % 50 != 0]  # without the edges
    torch.testing.assert_close(staircase(u, 50.0)[0], u, rtol=0, atol=1e-4)
    torch.testing.assert_close(staircase(u, 50.0)[1], torch.ones_like(u), rtol=0, atol=1e-3)
    torch.testing.assert_close(staircase(u, 1e-3)[0], u.round(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_and_gradients_are_those_of_autograd(grid, temperature):
    W, s, z = case(grid)
    upstream = torch.randn(4, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = [], []
    for function, into in ((soft_quantize, found), (plainly, expected)):
        weight, scale = W.clone().requires_grad_(), s.clone().requires_grad_()
        Q = function(weight, scale, z, grid, temperature)
        Q.backward(upstream)
        into += [Q.detach(), weight.grad, scale.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert found[1].count_nonzero() < found[1].numel(), "no code was clamped"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_is_the_slope_of_the_function(grid):
    W, s, z = case(grid, seed=2)
    assert torch.autograd.gradcheck(
        lambda weight, scale: soft_quantize(weight, scale, z, grid, 0.4),
        (W.requires_grad_(), s.requires_grad_()), eps=1e-7, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_ends_at_rounding_to_nearest(grid):
    W, s, z = (value.float() for value in case(grid))
    hard = fake_quantize(W, s, z, grid)
    assert torch.equal(soft_quantize(W, s, z, grid, 0.0), hard)
    nearly = soft_quantize(W, s, z, grid, 1e-3)
    assert float(((nearly - hard).abs() > 1e-4).float().mean()) < 0.02
