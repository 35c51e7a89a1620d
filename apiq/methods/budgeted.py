"""Any method under a budget of bits: the grid of each linear is chosen before the first block is solved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from apiq.adapters.closed_form import weighted
from apiq.adapters.configuration import targets
from apiq.adapters.targets import shapes
from apiq.blocks.architecture import linears
from apiq.blocks.backward import squared_gradients
from apiq.blocks.problem import Method, Problem, Solution
from apiq.blocks.survey import Surveyor, Whole
from apiq.blocks.unfuse import unfuse
from apiq.errors import ApiqError
from apiq.grids.affine import Grid, encode
from apiq.grids.normal_float import NormalFloat
from apiq.grids.search import SHARES, searched
from apiq.methods.budget import BudgetTooSmall, Candidate, allocate
from apiq.methods.fisher import Weights, alike, separated
from apiq.methods.grid import grid_of, nearest, packed_bits, values
from apiq.params import QuantizeParams

TIED = re.compile(r"(?P<parent>.*?)(?P<name>(?P<attention>[qkv]_proj|query|key|value)|gate_proj|up_proj|w1|w3)")
"""Linears that serving engines fuse into one, so that they must have one grid: query, key, value; gate, up."""


class Budgeted:
    """`method` on the grids with which the loss rises least while a weight takes `target_bits` bits in the mean.

    What a linear loses on a grid is estimated by sum_ij F_ij (W - B A^T - Q)_ij^2: F is the diagonal Fisher
    information of the calibration windows (or 1, with `sensitivity: none`), A and B are the best of the method's
    rank, Q is rounded to nearest on searched ranges. The cheapest choice is the solution of an integer program
    (LQ-LoRA, arXiv 2311.12023, section 3.2); linears that are fused when served take one grid.
    """

    def __init__(self, method: Method, params: QuantizeParams):
        self.method, self.params = method, params
        self.calibrated = params.calibrated
        self.adapted = method.adapted
        self.grids: dict[int, dict[str, Grid]] = {}

    def survey(self, whole: Whole) -> dict[str, Tensor]:
        """The number of the grid of every linear among the candidates, and what the method itself wants to know.

        Raises:
            ApiqError: the model has no loss, a gradient is not finite, or no choice of grids meets the target.
        """
        offers: dict[str, list[Candidate]] = {}
        total = 0
        for index, block, squares in self._blocks(whole):
            carriers = targets(self.params, shapes(linears(block)), strict=False) if self.adapted else ()
            for name, linear in linears(block).items():
                W = linear.weight.detach().float()
                weights = separated(squares[name]) if name in squares else alike(W)
                offers[f"{index}.{name}"] = candidates(W, weights, self.params, name in carriers)
                total += W.numel()
        chosen = divided(offers, self.params, total)
        found = {f"grid.{name}": torch.tensor(number) for name, number in chosen.items()}
        if isinstance(self.method, Surveyor):
            found |= {f"method.{key}": value for key, value in self.method.survey(whole).items()}
        return found

    def surveyed(self, found: dict[str, Tensor]) -> None:
        """Take in what `survey` found."""
        options = candidate_grids(self.params)
        own: dict[str, Tensor] = {}
        for key, value in found.items():
            kind, _, name = key.partition(".")
            if kind == "method":
                own[name] = value
                continue
            index, _, linear = name.partition(".")
            self.grids.setdefault(int(index), {})[linear] = options[int(value)]
        if isinstance(self.method, Surveyor):
            self.method.surveyed(own)

    def solve(self, problem: Problem) -> Solution:
        """Let the method solve the block on its grids."""
        problem.grids = self.grids.get(problem.index, {})
        return self.method.solve(problem)

    def _blocks(self, whole: Whole) -> Iterator[tuple[int, nn.Module, dict[str, Tensor]]]:
        """The blocks, each with the Fisher information of its linears where it is asked for."""
        if self.params.sensitivity == "fisher":
            yield from squared_gradients(whole)
            return
        for index in range(len(whole.calls)):
            whole.report("candidates of", index)
            yield index, unfuse(whole.stream.load_block(index, whole.device)), {}


@torch.no_grad()
def candidates(W: Tensor, weights: Weights, params: QuantizeParams, carries: bool) -> list[Candidate]:
    """Size and cost of W (out, in) on each candidate grid, beside one low-rank part for all where it `carries` one."""
    if carries:
        A, B = weighted(W, torch.zeros_like(W), weights.rows, weights.columns, params.rank)
        W = W - B @ A.t()
    G = torch.diag(weights.columns.square())
    return [
        Candidate(packed_bits(W.shape, grid), float(weights.error(W - _rounded(W, grid, G))))
        for grid in candidate_grids(params)
    ]


def _rounded(W: Tensor, grid: Grid, G: Tensor) -> Tensor:
    """W (out, in) on `grid`, to nearest, on ranges that are searched where the levels are uniform."""
    if isinstance(grid, NormalFloat):
        return values(*nearest(W, grid), grid)
    s, z = searched(W, grid, G, [(share, share) for share in SHARES])
    return values(encode(W, s, z, grid), s, z, grid)


def divided(offers: Mapping[str, Sequence[Candidate]], params: QuantizeParams, weights: int) -> dict[str, int]:
    """The number of the candidate of each linear with which so many weights take `target_bits` each, or a little less.

    Raises:
        ApiqError: the smallest candidates take more.
    """
    target = params.target_bits
    assert target is not None
    try:
        return allocate(offers, target * weights, tied(offers))
    except BudgetTooSmall as error:
        raise ApiqError(
            f"quantize.target_bits is {target}, but the smallest candidates take {error.least / weights:.4g} bits a "
            "weight; raise it, or add fewer bits or larger groups to candidate_bits and candidate_group_sizes."
        ) from None


def tied(names: Iterable[str]) -> list[list[str]]:
    """The linears that must have one grid, by their names: query, key and value of one layer, and gate and up."""
    together: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        found = TIED.fullmatch(name)
        if found:
            together.setdefault((found["parent"], found["attention"] is not None), []).append(name)
    return list(together.values())


def candidate_grids(params: QuantizeParams) -> list[Grid]:
    """The grids among which a target of bits is met."""
    return [
        grid_of(params.model_copy(update={"bits": bits, "group_size": group_size}))
        for bits in params.candidate_bits
        for group_size in params.candidate_group_sizes
    ]
