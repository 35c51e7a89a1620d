"""What other formats cannot hold, said in one sentence with the setting that would make it possible."""

from __future__ import annotations

from collections.abc import Collection

from apiq.errors import ApiqError
from apiq.exports.source import Source
from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat


def require_uniform(source: Source, format: str) -> None:
    """Refuse levels other than s (codes - z) with whole numbers z.

    Raises:
        ApiqError: the levels of a linear are those of NormalFloat, or an adapter was merged into its zero points.
    """
    if any(isinstance(grid, NormalFloat) for grid in source.grids.values()):
        raise ApiqError(
            f"{format} has no NormalFloat levels; quantize with a method of uniform levels (apiq-bw, or loftq with "
            "loftq.levels: uniform), or export with --format dense."
        )
    for name, grid in source.grids.items():
        if grid.offsets:
            raise ApiqError(
                f"{format} has whole zero points, and those of {name} hold a merged adapter; export the folder from "
                "before apiq merge --into zeros, with its adapter beside, or this one with --format dense."
            )


def require_whole_zeros(source: Source, format: str) -> None:
    """Refuse zero points halfway between two whole numbers.

    Raises:
        ApiqError: the grid of a linear is balanced.
    """
    if any(grid.balanced for grid in source.grids.values()):
        raise ApiqError(
            f"{format} has whole zero points only, and those of quantize.symmetric: balanced are none; quantize with "
            "quantize.symmetric: true or false, or export with --format dense."
        )


def one_grid(source: Source, format: str) -> Grid:
    """The grid that all linears share.

    Raises:
        ApiqError: there are several.
    """
    found = {grid: name for name, grid in source.grids.items()}
    if len(found) > 1:
        raise ApiqError(
            f"{format} has one grid for all linears, {' and '.join(list(found.values())[:2])} have different ones; "
            "quantize with one grid, or export with --format compressed-tensors or dense."
        )
    return next(iter(found))


def require_bits(grid: Grid, format: str, allowed: Collection[int]) -> None:
    """Refuse widths that the format does not know.

    Raises:
        ApiqError: quantize.bits is not among `allowed`.
    """
    if grid.bits not in allowed:
        names = ", ".join(map(str, allowed))
        raise ApiqError(f"{format} holds {names} bits, the model has {grid.bits}; quantize with such quantize.bits.")


def common_group_size(source: Source, format: str, grid: Grid) -> int:
    """The group size for the configuration of the format: -1 for one group a row in every linear of `grid`.

    Raises:
        ApiqError: the last group of a row is shorter somewhere, or a row is one group in some linears only.
    """
    widths = {name: shape[1] for name, shape in source.shapes.items() if source.grids[name] == grid}
    if all(grid.groups(width) == 1 for width in widths.values()):
        return -1
    for name, width in widths.items():
        if width % grid.group_size:
            raise ApiqError(
                f"{format} needs a group size that divides every width: {name} has {width} inputs, quantize.group_size "
                f"is {grid.group_size}; quantize with one that divides it, or with 0."
            )
    return grid.group_size


def require_whole_words(source: Source, format: str, inputs: int, outputs: int) -> None:
    """Refuse linears whose inputs or outputs are no multiples of what the format packs together.

    Raises:
        ApiqError: a linear has other widths; no setting helps but leaving the format.
    """
    for name, (out_features, in_features) in source.shapes.items():
        if in_features % inputs or out_features % outputs:
            raise ApiqError(
                f"{format} packs {outputs} outputs and {inputs} inputs together, {name} has {out_features} and "
                f"{in_features}; export with --format compressed-tensors or dense."
            )
