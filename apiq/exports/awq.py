"""The GEMM layout of AWQ: 4 bits, eight outputs a word in an interleaved order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiq.errors import ApiqError
from apiq.exports.rules import (
    common_group_size,
    one_grid,
    require_bits,
    require_uniform,
    require_whole_words,
    require_whole_zeros,
)
from apiq.exports.shards import each, write_folder
from apiq.exports.source import Linear, Source
from apiq.grids.packing import pack

NAME = "AWQ"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each of the eight places of a word holds, lowest bits first."""


def check(source: Source, dtype: torch.dtype) -> None:
    """4 bits, with zero points or without.

    Raises:
        ApiqError: what the layout does not hold.
    """
    require_uniform(source, NAME)
    require_whole_zeros(source, NAME)
    require_bits(one_grid(source, NAME), NAME, (4,))
    common_group_size(source, NAME, one_grid(source, NAME))
    require_whole_words(source, NAME, inputs=1, outputs=8)
    source.unpacked_linears()
    if dtype != torch.float16:
        raise ApiqError(f"{NAME} runs in float16, the precision of its scales; export with --dtype float16.")


def write(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    write_folder(source, folder, each(tensors), dtype, quantization_config(source))


def tensors(linear: Linear) -> dict[str, Tensor]:
    """The tensors of a linear: qweight (in, out / 8), qzeros (G, out / 8), scales (G, out)."""
    codes, s, z = linear.parts
    made = {"qweight": _words(codes), "qzeros": _words(z), "scales": s.to(torch.float16).t()}
    return {f"{linear.name}.{part}": value for part, value in made.items()}


def quantization_config(source: Source) -> dict[str, Any]:
    """The entry of config.json."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": common_group_size(source, NAME, one_grid(source, NAME)),
        "zero_point": True,
        "modules_to_not_convert": source.unpacked_linears(),
    }


def _words(numbers: Tensor) -> Tensor:
    """(out, n) as (n, out / 8) words, each of eight outputs."""
    rows = numbers.to(torch.int64).t()
    return pack(rows.reshape(-1, 8)[:, list(ORDER)].reshape(rows.shape), 4)
