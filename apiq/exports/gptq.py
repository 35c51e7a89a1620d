"""The layouts of GPTQ: codes packed along the inputs, zero points along the outputs, both transposed.

Version 2 stores zero points as they are, version 1 one less (so that it cannot store 0). Engines take
version 1 for symmetric models of 4 and 8 bits.
"""

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
from apiq.files import write_json
from apiq.grids.packing import pack


def check_v1(source: Source, dtype: torch.dtype) -> None:
    """Symmetric, 4 or 8 bits.

    Raises:
        ApiqError: what the layout or its engines do not hold.
    """
    require_uniform(source, "GPTQ v1")
    require_whole_zeros(source, "GPTQ v1")
    require_bits(one_grid(source, "GPTQ v1"), "GPTQ v1", (4, 8))
    if not one_grid(source, "GPTQ v1").symmetric:
        raise ApiqError(
            "GPTQ v1 stores zero points less 1 and has none for 0; export with --format gptq-v2, or quantize with "
            "quantize.symmetric: true."
        )
    _check(source, "GPTQ v1", dtype)


def check_v2(source: Source, dtype: torch.dtype) -> None:
    """2, 3, 4 or 8 bits.

    Raises:
        ApiqError: what the layout does not hold.
    """
    require_uniform(source, "GPTQ v2")
    require_whole_zeros(source, "GPTQ v2")
    require_bits(one_grid(source, "GPTQ v2"), "GPTQ v2", (2, 3, 4, 8))
    _check(source, "GPTQ v2", dtype)


def _check(source: Source, name: str, dtype: torch.dtype) -> None:
    common_group_size(source, name, one_grid(source, name))
    require_whole_words(source, name, inputs=32, outputs=32)
    source.unpacked_linears()
    if dtype != torch.float16:
        raise ApiqError(f"{name} runs in float16, the precision of its scales; export with --dtype float16.")


def write_v1(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder with zero points less 1."""
    _write(source, folder, dtype, "gptq", less=1)


def write_v2(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder with zero points as they are."""
    _write(source, folder, dtype, "gptq_v2", less=0)


def _write(source: Source, folder: Path, dtype: torch.dtype, layout: str, less: int) -> None:
    config = quantization_config(source, layout)
    write_folder(source, folder, each(lambda linear: tensors(linear, less)), dtype, config)
    write_json(folder / "quantize_config.json", config)


def tensors(linear: Linear, less: int) -> dict[str, Tensor]:
    """The tensors of a linear: qweight (in b / 32, out), qzeros (G, out b / 32), scales (G, out), g_idx (in)."""
    _, s, z = linear.parts
    columns = linear.packed.in_features
    made = {
        "qweight": linear.packed.codes.t(),
        "qzeros": pack(z.to(torch.int64).t() - less, linear.grid.bits),
        "scales": s.to(torch.float16).t(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // linear.grid.width(columns),
    }
    return {f"{linear.name}.{part}": value for part, value in made.items()}


def quantization_config(source: Source, layout: str) -> dict[str, Any]:
    """The entry of config.json, which is quantize_config.json too."""
    grid = one_grid(source, "GPTQ")
    return {
        "quant_method": "gptq",
        "checkpoint_format": layout,
        "bits": grid.bits,
        "group_size": common_group_size(source, "GPTQ", grid),
        "sym": grid.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
