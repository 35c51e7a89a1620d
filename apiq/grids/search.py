"""Search of clipping ranges: for each group the one that costs its outputs least."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from apiq.grids.affine import Grid, extrema, fake_quantize, grouped, scale_and_zero

SHARES = tuple(1 - 0.05 * step for step in range(13))
"""Shares of the whole range that are tried: 1 to 0.4 (a Gaussian group at 2 bits wants about 0.65)."""


Pairs = Iterable[tuple[float, float]]


def searched(W: Tensor, grid: Grid, G: Tensor | None = None, pairs: Pairs | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points, each (out, G), of the ranges that `best_shares` finds."""
    low, high = extrema(W, grid)
    a, b = best_shares(W, grid, G, pairs)
    return scale_and_zero(a * low, b * high, grid)


def best_shares(W: Tensor, grid: Grid, G: Tensor | None = None, pairs: Pairs | None = None) -> tuple[Tensor, Tensor]:
    """The shares a and b, each (out, G), of the best range a low .. b high of each group of W (out, in).

    Minimise d^T H d for every row and group, with d the error of its weights and H the block of the second
    moments G = X^T X (in, in) that belongs to the group, or the identity without G. Correlations
    between groups are left out. The shares (a, b) are those of `pairs`; by default equal ones of SHARES, and on an
    asymmetric grid then b alone and a alone. Ties go to the first.
    """
    low, high = extrema(W, grid)
    blocks = None if G is None else diagonal_blocks(G, grid)
    first, second = torch.ones_like(low), torch.ones_like(high)
    least = torch.full_like(low, float("inf"))

    def tried(a: Tensor | float, b: Tensor | float) -> None:
        nonlocal first, second, least
        error = _error(W, *scale_and_zero(a * low, b * high, grid), grid, blocks)
        better = error < least
        least = torch.where(better, error, least)
        first, second = torch.where(better, a, first), torch.where(better, b, second)

    for a, b in pairs or ((share, share) for share in SHARES):
        tried(a, b)
    if pairs is None and not grid.symmetric:
        lower = first
        for share in SHARES:
            tried(lower, share)
        upper = second
        for share in SHARES:
            tried(share, upper)
    return first, second


def diagonal_blocks(G: Tensor, grid: Grid) -> Tensor:
    """The blocks (groups, g, g) of G (in, in) on its diagonal, zero where the last group is short."""
    width, groups = grid.width(len(G)), grid.groups(len(G))
    short = groups * width - len(G)
    whole = F.pad(G, (0, short, 0, short)).reshape(groups, width, groups, width)
    return whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _error(W: Tensor, s: Tensor, z: Tensor, grid: Grid, blocks: Tensor | None) -> Tensor:
    """Cost of each group, (out, G)."""
    D = fake_quantize(W, s, z, grid) - W
    short = -D.shape[1] % grid.width(D.shape[1])
    d = grouped(F.pad(D, (0, short)), grid)
    if blocks is None:
        return d.square().sum(-1)
    weighted = torch.einsum("ogi,gij->ogj", d, blocks)
    return (weighted * d).sum(-1)
