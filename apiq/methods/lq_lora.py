"""LQ-LoRA: a low-rank and a quantized part of the weight by turns (arXiv 2311.12023)."""

from __future__ import annotations

import torch
from torch import Tensor

from apiq.adapters.closed_form import weighted
from apiq.adapters.configuration import targets
from apiq.adapters.targets import shapes
from apiq.blocks.backward import squared_gradients
from apiq.blocks.problem import Problem, Solution
from apiq.blocks.survey import Whole
from apiq.grids.affine import Grid
from apiq.methods.fisher import Weights, alike, separated
from apiq.methods.grid import grid_in, nearest, packed, rank_in, values
from apiq.methods.starts import given_adapters
from apiq.params import QuantizeParams


class LqLora:
    """Minimise sum_ij F_ij (W - Q - B A^T)_ij^2 over codes, A and B, by turns; stop where a turn gains nothing.

    F is 1, or with `weights: fisher` the diagonal Fisher information of the calibration windows by rows and columns.
    """

    calibrated = False
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params
        self.calibrated = params.calibrated
        self.weights: dict[str, Weights] = {}

    def survey(self, whole: Whole) -> dict[str, Tensor]:
        """What the entries of every linear count, by the number of its block.

        Raises:
            ApiqError: the model has no loss, or a gradient is not finite.
        """
        if self.params.lq_lora.weights == "none":
            return {}
        return {
            f"{index}.{name}.{part}": value
            for index, _, squares in squared_gradients(whole)
            for name, square in squares.items()
            for part, value in vars(separated(square)).items()
        }

    def surveyed(self, found: dict[str, Tensor]) -> None:
        """Take in what `survey` found."""
        for name in {key.rpartition(".")[0] for key in found}:
            self.weights[name] = Weights(*(found[f"{name}.{part}"] for part in ("importance", "rows", "columns")))

    def solve(self, problem: Problem) -> Solution:
        """Decompose every linear that carries adapters, by itself; round the others."""
        solution, factors = Solution({}), {}
        found = problem.linears()
        carriers = targets(self.params, shapes(found), strict=False)
        for number, (name, linear) in enumerate(found.items()):
            W, key = linear.weight.detach().float(), f"{problem.index}.{name}"
            grid, weights = grid_in(problem, name, self.params), self.weights.get(key, alike(W)).to(W.device)
            parts = nearest(W, grid)
            if name in carriers:
                rank = rank_in(problem, name, self.params)
                parts, factors[name], error = decompose(W, grid, rank, self.params.lq_lora.steps, weights)
                problem.report((number + 1) / len(found), error / W.numel(), name)
            solution.linears[name] = packed(linear, parts, grid)
        solution.adapters = given_adapters(factors, self.params)
        return solution


@torch.no_grad()
def decompose(
    W: Tensor, grid: Grid, rank: int, steps: int, weights: Weights
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor], float]:
    """Codes, scales and zero points of Q, the factors A (in, r) and B (out, r), and the error of W - Q - B A^T.

    From Q = 0 on, each turn takes the best A and B for Q, then rounds W - B A^T to nearest (algorithm 2). At most
    `steps` turns; what a turn made worse is not kept, and no other follows.
    """
    Q, best = torch.zeros_like(W), None
    for _ in range(steps):
        A, B = weighted(W, Q, weights.rows, weights.columns, rank)
        parts = nearest(W - B @ A.t(), grid)
        Q = values(*parts, grid)
        error = float(weights.error(W - Q - B @ A.t()))
        if best is not None and error >= best[2]:
            break
        best = parts, (A, B), error
    assert best is not None
    return best
