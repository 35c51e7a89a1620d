"""The grid and rank that the parameters choose for a linear, and rounding to nearest on the grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apiq.blocks.problem import Problem
from apiq.grids import affine, normal_float
from apiq.grids.affine import Grid
from apiq.grids.levels import TERNARY
from apiq.grids.normal_float import NormalFloat
from apiq.layers.packed import PackedLinear
from apiq.params import QuantizeParams


def grid_of(params: QuantizeParams) -> Grid:
    """The grid of every linear."""
    if params.normal_float:
        double = {"qlora": params.qlora, "lq-lora": params.lq_lora}.get(params.method)
        double = double is not None and double.double_quantization
        return NormalFloat(params.bits, params.group_size, double=double)
    return Grid(params.bits, params.group_size, params.bits == TERNARY or params.symmetric)


def grid_in(problem: Problem, name: str, params: QuantizeParams) -> Grid:
    """The grid of the linear `name` of the block."""
    return problem.grids.get(name) or grid_of(params)


def rank_in(problem: Problem, name: str, params: QuantizeParams) -> int:
    """The rank of the adapter of the linear `name` of the block."""
    return problem.ranks.get(name, params.rank)


def nearest(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (out, in), scales and zero points (out, G) of W (out, in) rounded to nearest on the range of each group."""
    if isinstance(grid, NormalFloat):
        s = normal_float.scales(W, grid)
        return normal_float.encode(W, s, grid), s, None
    s, z = affine.scale_and_zero(*affine.extrema(W, grid), grid)
    return affine.encode(W, s, z, grid), s, z


def values(codes: Tensor, s: Tensor, z: Tensor | None, grid: Grid) -> Tensor:
    """Q (out, in) of codes, scales and zero points, float32."""
    if isinstance(grid, NormalFloat):
        return normal_float.decode(codes, s, grid)
    assert z is not None
    return affine.decode(codes, s, z, grid)


def packed_bits(shape: tuple[int, ...], grid: Grid) -> int:
    """Bits that the codes, scales and zero points of a weight of `shape` (out, in) take as they are stored."""
    with torch.device("meta"):
        linear = PackedLinear(shape[1], shape[0], grid, False, torch.float32)
    return 8 * sum(buffer.nbytes for buffer in linear.buffers())


@torch.no_grad()
def rounded(linear: nn.Linear, grid: Grid) -> PackedLinear:
    """`linear` with each group of its weight rounded to nearest on its whole range."""
    return packed(linear, nearest(linear.weight.detach().float(), grid), grid)


def packed(linear: nn.Linear, parts: tuple[Tensor, Tensor, Tensor | None], grid: Grid) -> PackedLinear:
    """`linear` with the given codes, scales and zero points in the place of its weight."""
    return PackedLinear.from_codes(*parts, grid, linear.bias, linear.weight.dtype)
