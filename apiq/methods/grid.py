"""The grid that the parameters choose, and rounding to nearest on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apiq.grids import affine, normal_float
from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat
from apiq.layers.packed import PackedLinear
from apiq.params import QuantizeParams


def grid_of(params: QuantizeParams) -> Grid:
    """The grid of every linear."""
    if params.normal_float:
        double = params.method == "qlora" and params.qlora.double_quantization
        return NormalFloat(params.bits, params.group_size, double=double)
    return Grid(params.bits, params.group_size, params.symmetric)


@torch.no_grad()
def rounded(linear: nn.Linear, grid: Grid, W: Tensor | None = None) -> PackedLinear:
    """`linear` with `W` (out, in) or else its own weight, each group rounded to nearest on its whole range."""
    W = (linear.weight if W is None else W).detach().float()
    if isinstance(grid, NormalFloat):
        s, z = normal_float.scales(W, grid), None
        codes = normal_float.encode(W, s, grid)
    else:
        s, z = affine.scale_and_zero(*affine.extrema(W, grid), grid)
        codes = affine.encode(W, s, z, grid)
    return PackedLinear.from_codes(codes, s, z, grid, linear.bias, linear.weight.dtype)
