"""How many levels so many bits have: 2^b, or three."""

from __future__ import annotations

TERNARY = 1.58
"""The bits that stand for three levels; log2 3 is 1.585."""


def levels(bits: float) -> int:
    """The number of levels of a code of 1 to 8 bits, or of TERNARY ones."""
    return 3 if bits == TERNARY else 2 ** int(bits)
