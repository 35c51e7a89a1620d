"""The affine grid against its equations, written out weight by weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiq.grids.affine import (
    Grid,
    clipped,
    clipped_gradient,
    decode,
    encode,
    extrema,
    fake_quantize,
    grouped,
    scale_and_zero,
    ungrouped,
)  # fmt: skip

grids = st.builds(
    Grid, bits=st.integers(2, 8), group_size=st.sampled_from([0, 1, 7, 32, 43, 64, 500]), symmetric=st.booleans()
)


def weight(seed, out=3, in_features=100, shift=0.0):
    return torch.randn(out, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05 + shift


@given(grid=grids, in_features=st.integers(1, 130))
def test_grouping_loses_nothing_and_keeps_extrema(grid, in_features):
    W = weight(0, in_features=in_features)
    groups = grouped(W, grid)
    assert groups.shape == (3, grid.groups(in_features), grid.width(in_features))
    assert torch.equal(ungrouped(groups, in_features), W)
    last = W[:, (grid.groups(in_features) - 1) * grid.width(in_features) :]
    assert torch.equal(groups[:, -1].amax(-1), last.amax(-1))


def test_scale_zero_and_codes_follow_the_paper():
    W, grid = weight(1), Grid(3, 10, False)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    codes = encode(W, s, z, grid)
    for row in range(3):
        for group in range(10):
            part = W[row, group * 10 : group * 10 + 10].double()
            scale = float(((part.max() - part.min()) / 7).half())
            zero = round(float(-part.min() / scale))
            assert float(s[row, group]) == scale
            assert float(z[row, group]) == zero
            expected = [min(max(round(float(w) / scale) + zero, 0), 7) for w in part]
            assert codes[row, group * 10 : group * 10 + 10].tolist() == expected


@given(grid=grids, shift=st.sampled_from([-1.0, 0.0, 1.0]), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_codes_and_zero_points_fit_into_their_bits(grid, shift, seed):
    W = weight(seed, shift=shift)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    assert bool((s > 0).all())
    assert torch.equal(s, s.half().float())
    assert bool(((z >= 0) & (z <= grid.top) & (z == z.round())).all())
    assert int(encode(W, s, z, grid).max()) <= grid.top


@given(grid=grids, shift=st.sampled_from([-1.0, 0.0, 1.0]), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_fake_quantization_is_decode_after_encode(grid, shift, seed):
    W = weight(seed, shift=shift)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    assert torch.equal(fake_quantize(W, s, z, grid), decode(encode(W, s, z, grid), s, z, grid))


@given(bits=st.integers(1, 8), value=st.sampled_from([-0.7, 0.0, 0.3]))
def test_a_constant_group_is_kept(bits, value):
    W, grid = torch.full((2, 8), value), Grid(bits, 4, False)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    assert torch.allclose(decode(encode(W, s, z, grid), s, z, grid), W, rtol=2e-3)


@given(grid=grids, seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_rounding_error_is_at_most_half_a_step_inside_the_range(grid, seed):
    W = weight(seed)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    ratio = grouped(W, grid) / s.unsqueeze(-1)
    inside = (ratio.round() + z.unsqueeze(-1)).clamp(0, grid.top) == ratio.round() + z.unsqueeze(-1)
    error = (grouped(fake_quantize(W, s, z, grid), grid) - grouped(W, grid)).abs() / s.unsqueeze(-1)
    assert float(error[inside].max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_equal_those_of_the_straight_through_graph(symmetric):
    """Against autograd on the same function written with detach, as in lines 6 to 8 of Algorithm 1."""
    grid = Grid(2, 16, symmetric)
    W = weight(2, in_features=40).requires_grad_()
    low, high = extrema(W.detach() * 0.6, grid)
    s, z = scale_and_zero(low, high, grid)
    s = s.detach().requires_grad_()
    upstream = weight(3, in_features=40)
    fake_quantize(W, s, z, grid).backward(upstream)
    mine = (W.grad.clone(), s.grad.clone())
    W.grad = s.grad = None
    u = grouped(W, grid) / s.unsqueeze(-1)
    free = u.detach().round() + z.unsqueeze(-1)
    codes = free.clamp(0, grid.top)
    straight_through = codes - u.detach() + u
    codes = torch.where(free == codes, straight_through, codes)
    Q = (codes - z.unsqueeze(-1)) * s.unsqueeze(-1)
    ungrouped(Q, 40).backward(upstream)
    torch.testing.assert_close(mine[1], s.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine[0], W.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1e-9, 1e7])
def test_gradients_of_the_clipping_factors_equal_those_of_autograd(symmetric, factor):
    """Also where s is too small or too large to be stored, and where both ends of a symmetric range are alike."""
    grid = Grid(3, 10, symmetric)
    low, high = extrema(weight(5, shift=0.02) * factor, grid)
    high[0, 0] = -low[0, 0]
    gamma, beta = (weight(seed)[:, :10].mul(20).requires_grad_() for seed in (6, 7))
    with torch.no_grad():
        beta[0, 0] = gamma[0, 0]
    upstream = weight(8)[:, :10]
    s, z = scale_and_zero(torch.sigmoid(beta) * low, torch.sigmoid(gamma) * high, grid)
    s.backward(upstream)
    mine = clipped_gradient(upstream, gamma.detach(), beta.detach(), low, high, grid)
    torch.testing.assert_close(mine[0], gamma.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(mine[1], beta.grad, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(clipped(gamma, beta, low, high, grid), (s, z), strict=True))


def test_more_bits_and_smaller_groups_lose_less():
    W = weight(4, out=16, in_features=256)

    def error(bits, group):
        grid = Grid(bits, group, False)
        s, z = scale_and_zero(*extrema(W, grid), grid)
        return float((fake_quantize(W, s, z, grid) - W).square().mean())

    assert error(2, 64) > error(3, 64) > error(4, 64) > error(8, 64)
    assert error(2, 0) > error(2, 64) > error(2, 16)
