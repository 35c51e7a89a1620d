"""LoftQ: codes and adapters that together are near the weight (arXiv 2310.08659, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apiq.adapters.closed_form import plain
from apiq.adapters.configuration import targets
from apiq.adapters.targets import shapes
from apiq.blocks.problem import Problem, Solution
from apiq.grids.affine import Grid
from apiq.layers.packed import PackedLinear
from apiq.methods.grid import grid_in, nearest, packed, rank_in, rounded, values
from apiq.methods.starts import given_adapters
from apiq.params import QuantizeParams


class Loftq:
    """Minimise || W - Q - B A^T || (Frobenius) over codes, A and B, by turns; no activation is looked at.

    Step t rounds W - B A^T to the grid, which gives Q, and takes for A and B the best rank-r
    approximation of W - Q; before the first step B A^T = 0.
    """

    calibrated = False
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params

    def solve(self, problem: Problem) -> Solution:
        """Alternate for every linear that carries adapters, by itself; round the others."""
        quantized, factors = {}, {}
        linears = problem.linears()
        carriers = targets(self.params, shapes(linears), strict=False)
        for number, (name, linear) in enumerate(linears.items()):
            grid = grid_in(problem, name, self.params)
            if name not in carriers:
                quantized[name] = rounded(linear, grid)
                continue
            rank = rank_in(problem, name, self.params)
            quantized[name], (A, B) = alternate(linear, grid, rank, self.params.loftq.steps)
            factors[name] = A, B
            error = (linear.weight - quantized[name].dequantized() - B @ A.t()).square().mean()
            problem.report((number + 1) / len(linears), float(error), name)
        return Solution(quantized, given_adapters(factors, self.params))


@torch.no_grad()
def alternate(linear: nn.Linear, grid: Grid, rank: int, steps: int) -> tuple[PackedLinear, tuple[Tensor, Tensor]]:
    """Q and (A (in, r), B (out, r)) after `steps` rounds for the weight W of `linear`, computed in float32."""
    W = linear.weight.detach().float()
    parts = nearest(W, grid)
    A, B = plain(W, values(*parts, grid), rank)
    for _ in range(steps - 1):
        parts = nearest(W - B @ A.t(), grid)
        A, B = plain(W, values(*parts, grid), rank)
    return packed(linear, parts, grid), (A, B)
