"""Blocks of weights of GGUF that hold our codes exactly: Q = d q with a float16 d and whole numbers q.

With c - z for q and s for d that is our grid, and with 2 (c - z) and s / 2 the balanced one. ggml (MIT licence)
defines the layouts: d, then for Q5_0 the fifth bits, then the low nibbles of weights 0 .. 15 with those of 16 .. 31
above them; Q8_0 holds bytes. These have 32 weights; TQ1_0 has 256 ternary ones, which the package `gguf` packs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apiq.grids.affine import Grid, decode
from apiq.grids.levels import TERNARY

BLOCK = 32
TERNARY_BLOCK = 256
HALF_RANGES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
"""h for which a type holds the whole numbers -h .. h - 1, from the smallest type to the largest."""


def fitting(grid: Grid, in_features: int) -> str | None:
    """The smallest type that holds every q of `grid` in rows of `in_features` weights, or None."""
    if grid.bits == TERNARY and in_features % TERNARY_BLOCK == grid.width(in_features) % TERNARY_BLOCK == 0:
        return "TQ1_0"
    whole = grid.symmetric and not grid.balanced
    low, high = (-grid.zero, grid.top - grid.zero) if whole else (-grid.top, grid.top)
    return next((name for name, half in HALF_RANGES.items() if -half <= low and high < half), None)


def blocks(codes: Tensor, s: Tensor, z: Tensor, grid: Grid, kind: str) -> np.ndarray:
    """The bytes of the rows, uint8 (out, in / 32 x bytes of a block).

    Args:
        codes: (out, in), with `in` a multiple of 32.
        s: scales (out, G), each a float16 number, of a balanced grid each twice a float16 number.
        z: zero points (out, G).
        grid: their grid, whose width is a multiple of 32.
        kind: what `fitting` says.
    """
    if kind == "TQ1_0":
        import gguf

        return gguf.quants.quantize(decode(codes, s, z, grid).numpy(), gguf.GGMLQuantizationType.TQ1_0)
    rows, width, parts = len(codes), grid.width(codes.shape[1]), 1 + grid.balanced
    q = parts * codes.to(torch.int16).reshape(rows, -1, width) - (parts * z).to(torch.int16).unsqueeze(-1)
    q = q.reshape(rows, -1, BLOCK).numpy()
    d = (s / parts).repeat_interleave(width // BLOCK, 1).to(torch.float16).unsqueeze(-1).numpy().view(np.uint8)
    if kind == "Q8_0":
        parts = [d, q.astype(np.int8).view(np.uint8)]
    else:
        u = (q + HALF_RANGES[kind]).astype(np.uint8)
        low = (u[..., :16] & 15) | ((u[..., 16:] & 15) << 4)
        fifth = [np.packbits(u >> 4, axis=-1, bitorder="little")] if kind == "Q5_0" else []
        parts = [d, *fifth, low]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)
