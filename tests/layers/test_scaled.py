"""A linear with trainable scales is the packed one, and its gradients are those of plain autograd."""

import pytest
import torch
from torch import nn

from apiq.grids.affine import Grid, encode, extrema, scale_and_zero
from apiq.grids.normal_float import NormalFloat
from apiq.layers import product
from apiq.layers.packed import PackedLinear
from apiq.layers.scaled import ScaledLinear
from apiq.methods.grid import nearest, packed


def linear(grid, bias=True, width=43):
    torch.manual_seed(0)
    dense = nn.Linear(width, 10, bias=bias)
    if isinstance(grid, NormalFloat):
        return packed(dense, nearest(dense.weight.detach(), grid), grid)
    s, z = scale_and_zero(*extrema(dense.weight.detach(), grid), grid)
    codes = encode(dense.weight.detach(), s, z, grid)
    made = PackedLinear.from_codes(codes, s, z, grid, dense.bias, torch.float32)
    if grid.offsets:
        made.offsets.normal_(std=0.1)
    return made


GRIDS = [
    Grid(2, 16, False), Grid(3, 0, True), Grid(4, 7, False), Grid(1, 7, "balanced"), Grid(2, 16, False, offsets=True),
    NormalFloat(4, 16), Grid(1.58, 7, True),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rows", [3, 2**20])
def test_outputs_and_gradients_are_those_of_autograd(grid, rows, monkeypatch):
    monkeypatch.setattr(product, "ROWS", rows * 43)
    base = linear(grid)
    scaled, X = ScaledLinear(base), torch.randn(2, 5, 43, requires_grad=True)
    with torch.no_grad():
        scaled.factor.mul_(1 + 0.1 * torch.randn_like(scaled.factor))
    codes, _, z = base.unpacked()
    levels = base.levels()
    if type(grid) is Grid:
        assert torch.equal(levels, codes - z.repeat_interleave(grid.width(43), 1)[:, :43])
    factor, Y = scaled.factor.detach().clone().requires_grad_(), X.detach().clone().requires_grad_()
    rounded = (base.scales.float() * factor.detach()).half().float()
    s = base.scales.float() * factor
    s = s + (rounded - s).detach()
    width = grid.width(43)
    Q = s.repeat_interleave(width, 1)[:, :43] * levels
    if grid.offsets:
        Q = Q + base.offsets.repeat_interleave(width, 1)[:, :43]
    expected, found = Y @ Q.t() + base.bias, scaled(X)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(scaled.factor.grad, factor.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(X.grad, Y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.weight.detach(), Q.detach())


def test_settled_it_is_the_packed_linear_with_the_trained_scales():
    scaled, X = ScaledLinear(linear(Grid(2, 16, False))), torch.randn(3, 43)
    with torch.no_grad():
        scaled.factor.mul_(1.3)
    trained = scaled(X)
    settled = scaled.settled()
    assert isinstance(settled, PackedLinear) and settled.scales.dtype == torch.float16
    torch.testing.assert_close(settled(X), trained)
