"""Round to nearest: the grid of each group is its range, nothing is fitted (equation 1)."""

from __future__ import annotations

from apiq.blocks.problem import Problem, Solution
from apiq.methods.grid import grid_in, rounded
from apiq.params import QuantizeParams


class RoundToNearest:
    """Codes of the unclipped range; needs no data and carries no adapters."""

    calibrated = False
    adapted = False

    def __init__(self, params: QuantizeParams):
        self.params = params

    def solve(self, problem: Problem) -> Solution:
        """Round the weight of every linear."""
        found = problem.linears()
        return Solution({name: rounded(linear, grid_in(problem, name, self.params)) for name, linear in found.items()})
