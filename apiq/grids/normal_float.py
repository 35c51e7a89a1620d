"""NormalFloat: levels at the quantiles of a normal distribution, scaled by the largest magnitude of a group.

QLoRA (arXiv 2305.14314, section 3, equation 4), written there for 4 bits. W (out, in), codes (out, in),
s (out, G): Q = s levels[codes].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from apiq.grids.affine import SCALE_DTYPE, SMALLEST_SCALE, Grid, grouped, ungrouped
from apiq.grids.double_quantization import nearest

OFFSET = 0.9677083
"""Probability of the outermost level, the one of the reference implementations at every width."""


@dataclass(frozen=True)
class NormalFloat(Grid):
    """A table of 2^b levels in -1 .. 1 instead of evenly spaced ones; no zero points are stored."""

    symmetric: bool = True
    """Always true: there are no zero points."""
    double: bool = False
    """Store the scales in 8 bits (`apiq.grids.double_quantization`) instead of as float16."""


def levels(bits: int, device: torch.device | None = None) -> Tensor:
    """The 2^bits levels in increasing order, float32: 0, 2^(b-1) of them above it and 2^(b-1) - 1 below.

    Raises:
        ValueError: fewer than 2 bits, which leave no level below 0.
    """
    return _levels(bits).to(device)


def scales(W: Tensor, grid: NormalFloat) -> Tensor:
    """The largest magnitude of each group, (out, G), float32: not yet rounded to what is stored.

    Codes are found with these, as the reference implementations do; storing moves a scale by 2^-12 of
    itself at most, or by what double quantization costs.
    """
    return grouped(W.float(), grid).abs().amax(-1).clamp(SMALLEST_SCALE, torch.finfo(SCALE_DTYPE).max)


def encode(W: Tensor, s: Tensor, grid: NormalFloat) -> Tensor:
    """The number of the level nearest to W / s, uint8 (out, in)."""
    codes = nearest(grouped(W.float(), grid) / s.unsqueeze(-1), levels(int(grid.bits), W.device))
    return ungrouped(codes, W.shape[1])


def decode(codes: Tensor, s: Tensor, grid: NormalFloat) -> Tensor:
    """Q = s levels[codes], (out, in), in the dtype of s."""
    values = levels(int(grid.bits), codes.device).to(s.dtype)[codes.int()]
    return ungrouped(grouped(values, grid) * s.unsqueeze(-1), codes.shape[1])


@cache
def _levels(bits: int) -> Tensor:
    if bits < 2:
        raise ValueError(f"NormalFloat needs 2 bits or more, not {bits}")
    half = 2 ** (bits - 1)
    above, below = (torch.linspace(OFFSET, 0.5, n + 1, dtype=torch.float64)[:-1] for n in (half, half - 1))
    zero = torch.zeros(1, dtype=torch.float64)
    table = torch.cat([-torch.special.ndtri(below), zero, torch.special.ndtri(above).flip(0)])
    return (table / table.max()).float()
