"""Round to nearest: the grid of each group is its range, nothing is fitted (equation 1)."""

from __future__ import annotations

from apiq.blocks.problem import Problem, Solution
from apiq.grids.affine import Grid, encode, extrema, scale_and_zero
from apiq.layers.packed import PackedLinear
from apiq.params import QuantizeParams


class RoundToNearest:
    """Codes of the unclipped range; needs no data and carries no adapters."""

    calibrated = False
    adapted = False

    def __init__(self, params: QuantizeParams):
        self.grid = Grid(params.bits, params.group_size, params.symmetric)

    def solve(self, problem: Problem) -> Solution:
        """Round the weight of every linear."""
        packed = {}
        for name, linear in problem.linears().items():
            W = linear.weight.detach()
            s, z = scale_and_zero(*extrema(W.float(), self.grid), self.grid)
            codes = encode(W.float(), s, z, self.grid)
            packed[name] = PackedLinear.from_codes(codes, s, z, self.grid, linear.bias, W.dtype)
        return Solution(packed)
