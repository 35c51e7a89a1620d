"""The searched range is the best of those that are tried, counted weight by weight."""

import pytest
import torch

from apiq.grids.affine import Grid, extrema, fake_quantize, scale_and_zero
from apiq.grids.levels import TERNARY
from apiq.grids.search import SHARES, diagonal_blocks, searched

GRIDS = [Grid(2, 8, False), Grid(2, 8, True), Grid(3, 7, False), Grid(1, 5, False), Grid(4, 0, True)]
GRIDS += [Grid(2, 8, "balanced"), Grid(1, 5, "balanced"), Grid(TERNARY, 5, True)]


def layer(width=20, out=4):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, width, generator=generator)
    return torch.randn(out, width, generator=generator), X.t() @ X / 50


def spans(grid, width):
    size = grid.width(width)
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_best_of_what_is_tried_by_brute_force(grid, weighted):
    """Equal shares; then the upper end alone, then the lower, where they may differ."""
    W, G = layer()
    H = G if weighted else torch.eye(len(G))
    Q = fake_quantize(W, *searched(W, grid, G if weighted else None), grid)
    low, high = extrema(W, grid)

    def cost(Q, row, span):
        d = (Q - W)[row, span]
        return float(d @ H[span, span] @ d)

    for row in range(len(W)):
        for span in spans(grid, W.shape[1]):

            def tried(pair, row=row, span=span):
                a, b = pair
                return cost(fake_quantize(W, *scale_and_zero(a * low, b * high, grid), grid), row, span)

            best = min(((share, share) for share in SHARES), key=tried)
            if not grid.symmetric:
                best = min([best, *((best[0], share) for share in SHARES)], key=tried)
                best = min([best, *((share, best[1]) for share in SHARES)], key=tried)
            assert cost(Q, row, span) == pytest.approx(tried(best), rel=1e-4)


def test_only_the_given_pairs_are_tried():
    W, _ = layer()
    grid = Grid(2, 8, False)
    low, high = extrema(W, grid)
    expected = scale_and_zero(0.5 * low, 0.7 * high, grid)
    assert all(torch.equal(a, b) for a, b in zip(searched(W, grid, pairs=[(0.5, 0.7)]), expected, strict=True))


def test_two_bits_of_a_gaussian_want_to_be_clipped():
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid(2, 64, False)
    whole = (fake_quantize(W, *scale_and_zero(*extrema(W, grid), grid), grid) - W).square().mean()
    best = (fake_quantize(W, *searched(W, grid), grid) - W).square().mean()
    assert best < 0.65 * whole


def test_on_searched_ranges_balanced_levels_lose_least_of_a_gaussian():
    """Steps and errors of 2, 3 and 4 levels: Max, Quantizing for minimum distortion (1960), table 1."""
    W = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for bits, symmetric in ((1, False), (1, "balanced"), (2, False), (2, True), (2, "balanced")):
        grid = Grid(bits, 64, symmetric)
        s, z = searched(W, grid)
        errors[bits, symmetric] = float((fake_quantize(W, s, z, grid) - W).square().mean())
        if symmetric == "balanced":
            assert float(s.mean()) == pytest.approx({1: 1.596, 2: 0.996}[bits], rel=0.06)
    assert errors[1, "balanced"] == pytest.approx(0.3634, rel=0.05) and errors[1, "balanced"] < errors[1, False]
    assert errors[2, "balanced"] == pytest.approx(0.1188, rel=0.05)
    assert errors[2, "balanced"] < min(errors[2, False], errors[2, True])
    grid = Grid(TERNARY, 64, True)
    s, z = searched(W, grid)
    assert float(s.mean()) == pytest.approx(1.224, rel=0.06)
    assert float((fake_quantize(W, s, z, grid) - W).square().mean()) == pytest.approx(0.1902, rel=0.05)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_are_those_on_the_diagonal(grid):
    _, G = layer()
    blocks = diagonal_blocks(G, grid)
    assert len(blocks) == grid.groups(20)
    for block, span in zip(blocks, spans(grid, 20), strict=True):
        size = span.stop - span.start
        assert torch.equal(block[:size, :size], G[span, span])
        assert not block[size:].any() and not block[:, size:].any()
