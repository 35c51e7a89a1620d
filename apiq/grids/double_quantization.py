"""Double quantization: the scales are themselves stored in 8 bits (QLoRA, arXiv 2305.14314, section 3).

The mean of all scales of a linear is taken off; what is left is divided by the largest magnitude in each
block of 256 consecutive scales and rounded to the nearest of 256 levels between -1 and 1. The levels are
the 8-bit floats of Dettmers (arXiv 1511.04561): a sign, and in each of 7 decades twice as many evenly
spaced values as in the decade below.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Scales that share a range."""
DECADES = 7


class StoredScales(NamedTuple):
    """Scales in 8 bits."""

    codes: Tensor
    """Numbers of the levels, uint8, in the shape of the scales."""
    ranges: Tensor
    """Largest magnitude of each block of 256 scales, float32 (blocks)."""
    mean: Tensor
    """The mean of all scales, float32, without dimensions."""


def store(s: Tensor) -> StoredScales:
    """Scales of any shape in 8 bits."""
    mean = s.float().mean()
    rows = _blocks(s.float() - mean)
    ranges = rows.abs().amax(-1)
    unit = rows / ranges.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return StoredScales(nearest(unit, levels(s.device)).flatten()[: s.numel()].reshape(s.shape), ranges, mean)


def restore(stored: StoredScales) -> Tensor:
    """The scales that `store` kept, float32."""
    rows = _blocks(levels(stored.codes.device)[stored.codes.int()])
    return (rows * stored.ranges.unsqueeze(-1)).flatten()[: stored.codes.numel()].reshape(
        stored.codes.shape
    ) + stored.mean


def blocks(count: int) -> int:
    """Blocks that `count` scales take."""
    return -(-count // BLOCK)


def levels(device: torch.device) -> Tensor:
    """The 256 levels in increasing order, float32."""
    return _levels().to(device)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The number of the level in the increasing `table` that is nearest to each value, the lower one of two; uint8."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


@cache
def _levels() -> Tensor:
    positive = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - DECADES + 1))
    half = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([-half, ends, half]).sort().values.float()


def _blocks(values: Tensor) -> Tensor:
    return F.pad(values.flatten(), (0, -values.numel() % BLOCK)).reshape(-1, BLOCK)
