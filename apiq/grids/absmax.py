"""Symmetric rounding of small matrices, as A and B, to 8 or 4 bits: codes in -m .. m with m = 2^(b-1) - 1.

The entries are taken in the order of memory in groups of 64; s = max |x| / m of a group is kept in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 64
"""Entries that share a scale."""
LEAST = 2.0**-126
"""The smallest scale."""


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (G, 64), uint8 with m added, and scales (G), bfloat16, of `x`; the last group ends in zeros."""
    top = 2 ** (bits - 1) - 1
    groups = F.pad(x.detach().float().flatten(), (0, -x.numel() % GROUP)).view(-1, GROUP)
    scales = (groups.abs().amax(-1) / top).clamp(min=LEAST).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-top, top) + top
    return codes.to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, bits: int, shape: torch.Size | list[int]) -> Tensor:
    """What `encode` has rounded, float32, as a tensor of `shape`."""
    top = 2 ** (bits - 1) - 1
    values = (codes.float() - top) * scales.float().unsqueeze(-1)
    return values.flatten()[: torch.Size(shape).numel()].view(shape)


def rounded(x: Tensor, bits: int) -> Tensor:
    """`x` rounded, in its own dtype; rounding again changes nothing. Its gradient is that of the identity."""
    value = decode(*encode(x, bits), bits, x.shape).to(x.dtype)
    return x + (value - x).detach() if x.requires_grad else value
