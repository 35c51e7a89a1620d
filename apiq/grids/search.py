"""Clipping ranges found from the weight alone."""

from __future__ import annotations

import torch
from torch import Tensor

from apiq.grids import sweeps
from apiq.grids.affine import Grid, grouped, scale_and_zero

FACTORS = (0.3, 0.999, 29)
"""The narrowest and the widest range that are tried, relative to the extrema, and how many."""


@torch.no_grad()
def closest_range(W: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """The factor c (out, G) for which the range c low .. c high of each group gives the least ||W - Q||^2.

    One factor for both ends, the best of FACTORS; W (out, in), the extrema low and high (out, G).
    """
    least = torch.full_like(low, torch.inf)
    best = torch.full_like(low, FACTORS[1])
    for factor in torch.linspace(*FACTORS).tolist():
        s, z = scale_and_zero(factor * low, factor * high, grid)
        Q = sweeps.dequantized(W, s, z, grid.top, grid.width(W.shape[1]), torch.float32)
        error = _summed(Q.sub_(W).square_(), grid)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, factor, best)
    return best


def _summed(V: Tensor, grid: Grid) -> Tensor:
    """The sum over each group of V (out, in), (out, G)."""
    total = grouped(V, grid).sum(-1)
    extra = -V.shape[1] % grid.width(V.shape[1])
    if extra:
        total[:, -1] -= extra * V[:, -1]  # with which a short last group was filled up
    return total
