"""compressed-tensors, pack-quantized and weight-only: the way to vLLM and SGLang.

Codes are packed along the inputs exactly as ours; scales are in the precision of the model, zero points
are packed along the outputs. The library stores c - 2^(b-1) and packs it with 2^(b-1) added: that is c.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiq.errors import ApiqError
from apiq.exports.rules import common_group_size, require_uniform
from apiq.exports.shards import each, write_folder
from apiq.exports.source import Linear, Source
from apiq.grids.packing import pack

NAME = "compressed-tensors"


def check(source: Source, dtype: torch.dtype) -> None:
    """1 to 8 bits, with zero points or without.

    Raises:
        ApiqError: the grid or the group size is none that the format holds, or `dtype` does not hold the scales.
    """
    require_uniform(source, NAME)
    common_group_size(source, NAME)
    source.unpacked_linears()
    if dtype == torch.bfloat16:
        raise ApiqError(
            f"{NAME} keeps scales in the precision of the model, and bfloat16 does not hold the float16 scales of the "
            "checkpoint; export with --dtype float16 or float32."
        )


def write(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    write_folder(source, folder, each(lambda linear: tensors(linear, dtype)), dtype, quantization_config(source))


def tensors(linear: Linear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a linear: words (out, ceil(in b / 32)), scales (out, G), zero points (ceil(out b / 32), G)."""
    _, s, z = linear.parts
    made = {
        "weight_packed": linear.packed.codes,
        "weight_scale": s.to(dtype),
        "weight_shape": torch.tensor([linear.packed.out_features, linear.packed.in_features]),
    }
    if not linear.grid.symmetric:
        made["weight_zero_point"] = pack(z.to(torch.int64).t(), linear.grid.bits).t()
    return {f"{linear.name}.{part}": value for part, value in made.items()}


def quantization_config(source: Source) -> dict[str, Any]:
    """The entry of config.json."""
    grid, group_size = source.grid, common_group_size(source, NAME)
    weights = {
        "num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False,
        **({"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}),
    }  # fmt: skip
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": source.unpacked_linears(),
    }
