"""Dequantized weights in 16 or 32 bits: what every program reads."""

from __future__ import annotations

from pathlib import Path

import torch

from apiq.exports.shards import cast, each, write_folder
from apiq.exports.source import Source


def check(source: Source, dtype: torch.dtype) -> None:
    """Everything can be dequantized whose linears have names.

    Raises:
        ApiqError: the linears are part of fused tensors.
    """
    source.unpacked_linears()


def write(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Q, computed in float32 and rounded once to `dtype`, under the name of the weight.

    Raises:
        ApiqError: a number is too large for `dtype`.
    """
    write_folder(
        source,
        folder,
        each(lambda linear: {f"{linear.name}.weight": cast(linear.dequantized(), dtype, linear.name)}),
        dtype,
    )
