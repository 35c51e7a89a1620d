"""AWQ: channels that carry much are made larger before rounding, and ranges are clipped (arXiv 2306.00978)."""

from __future__ import annotations

import torch
from torch import Tensor

from apiq.blocks.problem import Problem, Solution
from apiq.grids.affine import Grid, encode
from apiq.grids.search import searched
from apiq.methods.equivalent import Pair, pairs, put, transformed
from apiq.methods.gptq import add, output_error
from apiq.methods.grid import grid_in, nearest, packed, values
from apiq.methods.moments import Moments, in_order, moments
from apiq.params import QuantizeParams

EXPONENTS = tuple(step / 20 for step in range(20))
"""Exponents of the activations' magnitude that are tried."""
CLIPPING = tuple((1 - step / 20, 1 - step / 20) for step in range(10))
"""Shares of a group's range that are tried."""


class Awq:
    """Minimise || Xq (W - Q(W c) / c)^T || over c = mean |Xq|^a, then over the share of each range that is kept.

    The factors c go into the norm or linear that writes Xq (`apiq.methods.equivalent`), found for the linears
    that read the same tensor together; where nothing can take them, ranges are clipped only. Differences from
    the authors' code: the error of query, key and value is that of their own outputs, every linear is
    clipped, and both searches see all tokens, by their second moments.
    """

    calibrated = True
    adapted = False

    def __init__(self, params: QuantizeParams):
        self.params = params

    @torch.no_grad()
    def solve(self, problem: Problem) -> Solution:
        """Scale, clip and round the linears of one block."""
        size, linears = self.params.batch_size, problem.linears()
        others: dict[str, Tensor] = {}
        for pair in pairs(problem):
            found = moments(problem, problem.linears(), pair.readers[0], size)
            grid = grid_in(problem, pair.readers[0], self.params)
            changed = transformed(problem.block, pair, best_factors(problem, pair, found, grid))
            put(problem.block, changed)
            others.update({name: value for name, value in changed.items() if name.rpartition(".")[0] not in linears})
        solution = Solution({}, others=others)
        for fed in in_order(problem, size):
            W, grid = fed.linear.weight.float(), grid_in(problem, fed.name, self.params)
            s, z = searched(W, grid, fed.moments.G, CLIPPING)
            linear = packed(fed.linear, (encode(W, s, z, grid), s, z), grid)
            add(problem, solution, fed, linear, len(linears))
        return solution


def best_factors(problem: Problem, pair: Pair, found: Moments, grid: Grid) -> Tensor:
    """The factors c (channels) of the exponent under which rounding costs the outputs of the readers least."""
    weights = [problem.block.get_parameter(f"{name}.weight").float() for name in pair.readers]
    costs = []
    for exponent in EXPONENTS:
        c = factors(found.magnitude, exponent)
        rounded = (values(*nearest(W * c, grid), grid) / c for W in weights)
        costs.append(sum(output_error(W - Q, found.G) * len(W) for W, Q in zip(weights, rounded, strict=True)))
    return factors(found.magnitude, EXPONENTS[costs.index(min(costs))])


def factors(magnitude: Tensor, exponent: float) -> Tensor:
    """The magnitudes of channels to a power, at least 1e-4, over the geometric mean of the largest and smallest."""
    c = magnitude.pow(exponent).clamp(min=1e-4)
    return c / (c.max() * c.min()).sqrt()
