"""How grids are written in the `quantization_config` of config.json: one for all linears, and the exceptions.

A linear is named by the number of its block and its name in it, as in `3.mlp.down_proj`: what the list of blocks is
called differs between a model with a head and one without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from apiq.errors import ApiqError
from apiq.grids.affine import Grid
from apiq.grids.levels import TERNARY
from apiq.grids.normal_float import NormalFloat


def described(grid: Grid) -> dict[str, Any]:
    """The entries that `grid_of` reads."""
    entries = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    if isinstance(grid, NormalFloat):
        return {**entries, "levels": "normal-float", "double_quantization": grid.double}
    return {**entries, "levels": "uniform", **({"offsets": True} if grid.offsets else {})}


def grid_of(config: Mapping[str, Any]) -> Grid:
    """The grid of all linears but the exceptions; without `levels`, as in format 1, it is an affine one.

    Raises:
        ApiqError: its bits or its symmetry are none that are known.
    """
    bits, group_size = config["bits"], config["group_size"]
    if config.get("levels") == "normal-float":
        return NormalFloat(bits, group_size, double=config["double_quantization"])
    if config["symmetric"] not in (False, True, "balanced"):
        raise ApiqError(f"symmetric in config.json is {config['symmetric']!r}; it should be false, true or balanced.")
    if bits not in (*range(1, 9), TERNARY) or (bits == TERNARY and config["symmetric"] is not True):
        raise ApiqError(
            f"bits in config.json is {bits} where symmetric is {config['symmetric']}; it should be a whole number from "
            f"1 to 8, or {TERNARY} where symmetric is true."
        )
    return Grid(bits, group_size, config["symmetric"], config.get("offsets", False))


def grid_entries(grids: Mapping[str, Grid]) -> dict[str, Any]:
    """The entries for the grids of all linears by name: that of most of them and, where others differ, `exceptions`."""
    usual = described(Counter(grids.values()).most_common(1)[0][0])
    without = {"offsets": False}
    differing = {
        name: {key: value for key, value in (without | described(grid)).items() if (without | usual).get(key) != value}
        for name, grid in grids.items()
    }
    exceptions = {name: entries for name, entries in differing.items() if entries}
    return {**usual, **({"exceptions": exceptions} if exceptions else {})}


def grid_for(config: Mapping[str, Any], name: str) -> Grid:
    """The grid of the linear `name`."""
    return grid_of({**config, **(config.get("exceptions") or {}).get(name, {})})
