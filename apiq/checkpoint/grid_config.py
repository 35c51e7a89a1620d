"""How a grid is written in the `quantization_config` of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat


def described(grid: Grid) -> dict[str, Any]:
    """The entries that `grid_of` reads."""
    entries = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    if isinstance(grid, NormalFloat):
        return {**entries, "levels": "normal-float", "double_quantization": grid.double}
    return {**entries, "levels": "uniform"}


def grid_of(config: Mapping[str, Any]) -> Grid:
    """The grid that a quantization_config describes; without `levels`, as in format 1, it is an affine one."""
    bits, group_size = config["bits"], config["group_size"]
    if config.get("levels") == "normal-float":
        return NormalFloat(bits, group_size, double=config["double_quantization"])
    return Grid(bits, group_size, config["symmetric"])
