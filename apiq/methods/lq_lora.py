"""LQ-LoRA: a low-rank and a quantized part of the weight by turns, with bits where they count (arXiv 2311.12023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from apiq.adapters.closed_form import weighted
from apiq.adapters.configuration import targets
from apiq.adapters.targets import shapes
from apiq.blocks.architecture import linears
from apiq.blocks.backward import squared_gradients
from apiq.blocks.problem import Problem, Solution
from apiq.blocks.survey import Whole
from apiq.blocks.unfuse import unfuse
from apiq.errors import ApiqError
from apiq.grids.affine import Grid
from apiq.methods.budget import BudgetTooSmall, Candidate, allocate
from apiq.methods.fisher import Weights, alike, separated
from apiq.methods.grid import grid_of, nearest, packed, packed_bits, values
from apiq.methods.starts import given_adapters
from apiq.params import QuantizeParams


class LqLora:
    """Minimise sum_ij F_ij (W - Q - B A^T)_ij^2 over codes, A and B, by turns; stop where a turn gains nothing.

    F is 1, or with `weights: fisher` the diagonal Fisher information of the calibration windows by rows and columns.
    With `target_bits` bits and group size of each linear are those that cost least in all.
    """

    calibrated = False
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params
        self.calibrated = params.calibrated
        self.grid = grid_of(params)
        self.grids: dict[str, Grid] = {}
        self.weights: dict[str, Weights] = {}

    def survey(self, whole: Whole) -> dict[str, Tensor]:
        """The weights of every linear, and the number of its grid among the candidates; by the number of its block.

        Raises:
            ApiqError: the model has no loss, a gradient is not finite, or no choice of grids meets the target.
        """
        found: dict[str, Tensor] = {}
        offers: dict[str, list[Candidate]] = {}
        target, total = self.params.lq_lora.target_bits, 0
        for index, block, squares in self._blocks(whole):
            carriers = targets(self.params, shapes(linears(block)), strict=False)
            for name, linear in linears(block).items():
                W, key = linear.weight.detach().float(), f"{index}.{name}"
                weights = alike(W)
                if name in squares:
                    weights = separated(squares[name])
                    found.update({f"{key}.{part}": value for part, value in vars(weights).items()})
                if target is not None:
                    offers[key] = self._offers(W, weights, name in carriers)
                    total += W.numel()
        if target is not None:
            chosen = divided(offers, target, total)
            found.update({f"{key}.grid": torch.tensor(number) for key, number in chosen.items()})
        return found

    def surveyed(self, found: dict[str, Tensor]) -> None:
        """Take in what `survey` found."""
        options = candidate_grids(self.params)
        for key, value in found.items():
            name, _, part = key.rpartition(".")
            if part == "grid":
                self.grids[name] = options[int(value)]
            elif part == "importance":
                self.weights[name] = Weights(value, found[f"{name}.rows"], found[f"{name}.columns"])

    def solve(self, problem: Problem) -> Solution:
        """Decompose every linear that carries adapters, by itself; round the others."""
        solution, factors = Solution({}), {}
        found = problem.linears()
        carriers = targets(self.params, shapes(found), strict=False)
        for number, (name, linear) in enumerate(found.items()):
            W, key = linear.weight.detach().float(), f"{problem.index}.{name}"
            grid, weights = self.grids.get(key, self.grid), self.weights.get(key, alike(W)).to(W.device)
            parts = nearest(W, grid)
            if name in carriers:
                parts, factors[name], error = decompose(W, grid, self.params.rank, self.params.lq_lora.steps, weights)
                problem.report((number + 1) / len(found), error / W.numel(), name)
            solution.linears[name] = packed(linear, parts, grid)
        solution.adapters = given_adapters(factors, self.params)
        return solution

    def _blocks(self, whole: Whole) -> Iterator[tuple[int, nn.Module, dict[str, Tensor]]]:
        """The blocks, each with the Fisher information of its linears where it is asked for; none if nothing is."""
        wanted = self.params.lq_lora
        if wanted.weights == "fisher":
            yield from squared_gradients(whole)
        elif wanted.target_bits is not None:
            for index in range(len(whole.calls)):
                whole.report("candidates of", index)
                yield index, unfuse(whole.stream.load_block(index, whole.device)), {}

    @torch.no_grad()
    def _offers(self, W: Tensor, weights: Weights, carries: bool) -> list[Candidate]:
        """Size and cost of W (out, in) on each grid after one turn, in which all grids share the low-rank part."""
        if carries:
            A, B = weighted(W, torch.zeros_like(W), weights.rows, weights.columns, self.params.rank)
            W = W - B @ A.t()
        return [
            Candidate(packed_bits(W.shape, grid), float(weights.error(W - values(*nearest(W, grid), grid))))
            for grid in candidate_grids(self.params)
        ]


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


def divided(offers: Mapping[str, Sequence[Candidate]], target: float, weights: int) -> dict[str, int]:
    """The number of the candidate of each linear with which so many weights take `target` bits each, or a little less.

    Raises:
        ApiqError: the smallest candidates take more.
    """
    try:
        return allocate(offers, target * weights)
    except BudgetTooSmall as error:
        raise ApiqError(
            f"quantize.lq_lora.target_bits is {target}, but the smallest candidates take {error.least / weights:.4g} "
            "bits a weight; raise it, or add fewer bits or larger groups to candidate_bits and candidate_group_sizes."
        ) from None


def candidate_grids(params: QuantizeParams) -> list[Grid]:
    """The grids among which a target of bits is met."""
    wanted = params.lq_lora
    return [
        grid_of(params.model_copy(update={"bits": bits, "group_size": group_size}))
        for bits in wanted.candidate_bits
        for group_size in wanted.candidate_group_sizes
    ]
