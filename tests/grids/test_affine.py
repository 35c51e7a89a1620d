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
from apiq.grids.levels import TERNARY

SYMMETRIES = [False, True, "balanced"]
WIDTHS = st.sampled_from([0, 1, 7, 32, 43, 64, 500])
grids = st.one_of(
    st.builds(Grid, bits=st.integers(2, 8), group_size=WIDTHS, symmetric=st.booleans()),
    st.builds(Grid, bits=st.integers(1, 8), group_size=WIDTHS, symmetric=st.just("balanced")),
    st.builds(Grid, bits=st.just(TERNARY), group_size=WIDTHS, symmetric=st.just(True)),
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
    assert bool(((z >= 0) & (z <= grid.top)).all())
    assert bool((z == (grid.top / 2 if grid.balanced else z.round())).all())
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
    inside = (ratio >= -z.unsqueeze(-1) - 0.5) & (ratio <= grid.top - z.unsqueeze(-1) + 0.5)
    error = (grouped(fake_quantize(W, s, z, grid), grid) - grouped(W, grid)).abs() / s.unsqueeze(-1)
    assert float(error[inside].max()) <= 0.5 + 1e-4


@given(grid=grids, seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_a_code_is_that_of_the_nearest_level(grid, seed):
    """By brute force over all levels, on ranges that leave some weights out."""
    W = weight(seed)
    low, high = extrema(W, grid)
    s, z = scale_and_zero(0.7 * low, 0.7 * high, grid)
    levels = s.unsqueeze(-1) * (torch.arange(grid.top + 1) - z.unsqueeze(-1))
    error = (grouped(fake_quantize(W, s, z, grid), grid) - grouped(W, grid)).abs()
    least = (levels.unsqueeze(-2) - grouped(W, grid).unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close(error, least, rtol=0, atol=1e-6)


@given(bits=st.integers(1, 8), group=WIDTHS, seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_the_balanced_grid_mirrors_every_weight_and_has_no_zero(bits, group, seed):
    grid = Grid(bits, group, "balanced")
    W = weight(seed)
    W[0, :3] = torch.tensor([1e-30, -1e-30, 0.0])  # far below the step: only their signs are left
    s, z = scale_and_zero(*extrema(W, grid), grid)
    Q = fake_quantize(W, s, z, grid)
    steps = grouped(Q, grid) / s.unsqueeze(-1)
    assert bool((2 * steps % 2 == 1).all()) and float(steps.abs().max()) <= grid.top / 2
    tied = W / s.repeat_interleave(grid.width(100), 1)[:, :100]
    mirrored = fake_quantize(-W, s, z, grid)
    assert torch.equal(mirrored.where(tied != tied.round(), -Q), -Q)
    assert Q[0, 0] > 0 > Q[0, 1] and bool(((Q > 0) == (W > 0)).where(W != 0, True).all())


@pytest.mark.parametrize("symmetric", SYMMETRIES)
def test_codes_of_what_is_trained_are_found_too(symmetric):
    W, grid = weight(1), Grid(2, 20, symmetric)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    assert torch.equal(encode(W.clone().requires_grad_(), s.requires_grad_(), z, grid), encode(W, s.detach(), z, grid))


def test_one_balanced_bit_is_the_sign():
    W, grid = weight(1), Grid(1, 20, "balanced")
    s, z = scale_and_zero(*extrema(W, grid), grid)
    reach = grouped(W, grid).abs().amax(-1)
    torch.testing.assert_close(s, reach, rtol=2**-10, atol=0)
    assert torch.equal(fake_quantize(W, s, z, grid), ungrouped(grouped(W, grid).sign() * s.unsqueeze(-1) / 2, 100))


@given(group=WIDTHS, seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_the_ternary_grid_has_a_step_either_side_of_0_and_fills_the_range(group, seed):
    grid, W = Grid(TERNARY, group, True), weight(seed)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    reach = grouped(W, grid).abs().amax(-1)
    torch.testing.assert_close(s, 2 * reach / 3, rtol=2**-10, atol=2**-24)
    Q = fake_quantize(W, s, z, grid)
    assert set((grouped(Q, grid) / s.unsqueeze(-1)).unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(fake_quantize(-W, s, z, grid), -Q)
    assert torch.equal(Q == 0, grouped(W, grid).abs().div(s.unsqueeze(-1)).le(0.5).view(3, -1)[:, :100])


@pytest.mark.parametrize("symmetric", [False, "balanced"])
def test_a_ternary_grid_of_another_symmetry_is_refused(symmetric):
    with pytest.raises(ValueError, match="symmetric"):
        Grid(TERNARY, 64, symmetric)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    ("bits", "symmetric", "near"), [*((bits, "balanced", 1.15) for bits in (1, 2, 3, 4)), (TERNARY, True, 1.2)]
)
def test_cells_that_fill_the_range_lose_less_than_levels_that_reach_its_ends(bits, symmetric, near, group):
    """The start of the range: s = 2 max / levels against 2 max / (levels - 1), on normal weights."""
    W, grid = weight(9, out=64, in_features=256), Grid(bits, group, symmetric)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    filling, reaching = (
        float((fake_quantize(W, scale, z, grid) - W).square().mean()) for scale in (s, s * (grid.top + 1) / grid.top)
    )
    assert filling < reaching * (grid.top / (grid.top + 1)) ** 2 * near


@pytest.mark.parametrize(
    "grid",
    [*(Grid(2, 16, symmetric) for symmetric in SYMMETRIES), Grid(1, 7, "balanced"), Grid(TERNARY, 7, True)],
    ids=str,
)
def test_gradients_equal_those_of_the_straight_through_graph(grid):
    """Against autograd on the same function written with detach, as in lines 6 to 8 of Algorithm 1."""
    W = weight(2, in_features=40).double().requires_grad_()
    low, high = extrema(W.detach() * 0.6, grid)
    s, z = scale_and_zero(low, high, grid)
    s = s.detach().requires_grad_()
    upstream = weight(3, in_features=40)
    fake_quantize(W, s, z, grid).backward(upstream)
    mine = (W.grad.clone(), s.grad.clone())
    W.grad = s.grad = None
    u = grouped(W, grid) / s.unsqueeze(-1)
    free = u.detach().floor() + grid.top / 2 + 0.5 if grid.balanced else u.detach().round() + z.unsqueeze(-1)
    codes = free.clamp(0, grid.top)
    assert bool((free != codes).any()), "no code was clamped"
    straight_through = codes - u.detach() + u
    codes = torch.where(free == codes, straight_through, codes)
    Q = (codes - z.unsqueeze(-1)) * s.unsqueeze(-1)
    ungrouped(Q, 40).backward(upstream)
    torch.testing.assert_close(mine[1], s.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine[0], W.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("symmetric", SYMMETRIES)
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
