"""Dense packing of b-bit codes into 32-bit words: 3 bits cost 3 bits.

A row of n codes is one stream of n b bits, least significant bit first, cut into ceil(n b / 32)
little-endian words held as int32. Code i occupies the bits i b .. i b + b - 1 of its row and may
straddle two words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32


def words(columns: int, bits: int) -> int:
    """32-bit words that a row of `columns` codes takes."""
    return math.ceil(columns * bits / WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns) in 0 .. 2^bits - 1 as int32 (rows, words).

    Raises:
        ValueError: a code does not fit into `bits` bits.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must lie in 0 .. {2**bits - 1}, found {int(codes.min())} .. {int(codes.max())}")
    rows, columns = codes.shape
    first, shift = _positions(columns, bits, codes.device)
    spread = codes.to(torch.int64) << shift
    stream = torch.zeros(rows, words(columns, bits) + 1, dtype=torch.int64, device=codes.device)
    stream.index_add_(1, first, spread & 0xFFFFFFFF)
    stream.index_add_(1, first + 1, spread >> WORD)
    stream = stream[:, :-1]
    return torch.where(stream >= 2**31, stream - 2**32, stream).to(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: codes as uint8 (rows, columns)."""
    mask = 2**bits - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shifts).bitwise_and_(mask)
        return codes.to(torch.uint8).reshape(packed.shape[0], -1)[:, :columns]
    first, shift = _positions(columns, bits, packed.device)
    stream = torch.nn.functional.pad(packed, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    pair = stream[:, first] | (stream[:, first + 1] << WORD)
    return ((pair >> shift) & mask).to(torch.uint8)


def _positions(columns: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    start = torch.arange(columns, device=device) * bits
    return start // WORD, start % WORD
