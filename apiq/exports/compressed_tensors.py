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
from apiq.exports.rules import common_group_size, require_bits, require_uniform, require_whole_zeros
from apiq.exports.shards import each, write_folder
from apiq.exports.source import Linear, Source
from apiq.grids.affine import Grid
from apiq.grids.packing import pack

NAME = "compressed-tensors"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that engines compute as one."""


def check(source: Source, dtype: torch.dtype) -> None:
    """1 to 8 bits, with zero points or without.

    Raises:
        ApiqError: the grid or the group size is none that the format holds, or `dtype` does not hold the scales.
    """
    require_uniform(source, NAME)
    require_whole_zeros(source, NAME)
    for grid in set(source.grids.values()):
        require_bits(grid, NAME, range(1, 9))
        common_group_size(source, NAME, grid)
    _require_fusable(source)
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
    grids = list(dict.fromkeys(source.grids.values()))
    groups = {}
    for number, grid in enumerate(grids):
        named = [name for name, own in source.grids.items() if own == grid]
        targets = ["Linear"] if len(grids) == 1 else named
        groups[f"group_{number}"] = {"targets": targets, "weights": _weights(source, grid)}
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": source.unpacked_linears(),
    }


def _weights(source: Source, grid: Grid) -> dict[str, Any]:
    size = common_group_size(source, NAME, grid)
    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    return {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False, **strategy}


def _require_fusable(source: Source) -> None:
    """Refuse different grids in linears that engines fuse to one."""
    for name, grid in source.grids.items():
        parent, _, last = name.rpartition(".")
        for other in next((fused for fused in FUSED if last in fused), ()):
            if source.grids.get(f"{parent}.{other}", grid) != grid:
                raise ApiqError(
                    f"engines fuse {name} with {parent}.{other}, and the two have different grids; quantize with "
                    "one grid for both, or export with --format dense."
                )
