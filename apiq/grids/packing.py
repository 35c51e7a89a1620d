"""Dense packing of b-bit codes into 32-bit words: 3 bits cost 3 bits.

A row of n codes is one stream of n b bits, least significant bit first, cut into ceil(n b / 32)
little-endian words held as int32. Code i occupies the bits i b .. i b + b - 1 of its row and may
straddle two words.

Five ternary codes are the digits of one number below 3^5 = 243, the first the least significant, and these numbers are
packed with 8 bits: 20 codes a word, 1.6 bits each, as many as one number below 3^20 would hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from apiq.grids.levels import TERNARY, levels

WORD = 32
DIGITS = 5
"""Ternary codes in a number of 8 bits."""
DIGITS_OF = (torch.arange(256).unsqueeze(-1) // 3 ** torch.arange(DIGITS) % 3).to(torch.uint8)
"""The ternary digits of each number of 8 bits, (256, 5): to look them up takes a small part of the time of dividing."""


def words(columns: int, bits: float) -> int:
    """32-bit words that a row of `columns` codes takes."""
    if bits == TERNARY:
        return words(math.ceil(columns / DIGITS), 8)
    return math.ceil(columns * bits / WORD)


def pack(codes: Tensor, bits: float) -> Tensor:
    """Codes (rows, columns) in 0 .. 2^bits - 1, or of TERNARY bits in 0 .. 2, as int32 (rows, words).

    Raises:
        ValueError: a code does not fit into `bits` bits.
    """
    top = levels(bits) - 1
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > top):
        raise ValueError(f"codes must lie in 0 .. {top}, found {int(codes.min())} .. {int(codes.max())}")
    if bits == TERNARY:
        digits = F.pad(codes.to(torch.int64), (0, -codes.shape[1] % DIGITS)).unflatten(1, (-1, DIGITS))
        return _pack((digits * 3 ** torch.arange(DIGITS, device=codes.device)).sum(-1), 8)
    return _pack(codes, int(bits))


def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    first, shift = _positions(columns, bits, codes.device)
    spread = codes.to(torch.int64) << shift
    stream = torch.zeros(rows, words(columns, bits) + 1, dtype=torch.int64, device=codes.device)
    stream.index_add_(1, first, spread & 0xFFFFFFFF)
    stream.index_add_(1, first + 1, spread >> WORD)
    stream = stream[:, :-1]
    return torch.where(stream >= 2**31, stream - 2**32, stream).to(torch.int32)


def unpack(packed: Tensor, bits: float, columns: int) -> Tensor:
    """The inverse of `pack`: codes as uint8 (rows, columns)."""
    if bits == TERNARY:
        numbers = _unpack(packed, 8, math.ceil(columns / DIGITS))
        return DIGITS_OF.to(packed.device)[numbers.int()].flatten(1)[:, :columns]
    return _unpack(packed, int(bits), columns)


def _unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    mask = 2**bits - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shifts).bitwise_and_(mask)
        return codes.to(torch.uint8).reshape(packed.shape[0], -1)[:, :columns]
    first, shift = _positions(columns, bits, packed.device)
    stream = F.pad(packed, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    pair = stream[:, first] | (stream[:, first + 1] << WORD)
    return ((pair >> shift) & mask).to(torch.uint8)


def _positions(columns: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    start = torch.arange(columns, device=device) * bits
    return start // WORD, start % WORD
