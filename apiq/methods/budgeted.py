"""Any method under a budget of bits: grid and rank of each linear are chosen before the first block is solved."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apiq.adapters.closed_form import weighted
from apiq.adapters.configuration import targets
from apiq.adapters.targets import Shapes, shapes
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


SHORT = 0.02
"""Bits a weight by which the largest candidates may stay below the budget."""


class Choice(NamedTuple):
    """What a linear may become under a budget."""

    grid: Grid
    rank: int
    """Of its adapter, where it carries one."""


class Budgeted:
    """`method` on the grids, and with the ranks, with which the loss rises least.

    A weight takes `target_bits` bits in the mean, adapters not counted. Where there are `candidate_ranks`, the adapters
    of all linears together take as much as with `rank` everywhere, or a little less.

    What a linear loses on a grid is estimated by sum_ij F_ij (W - B A^T - Q)_ij^2: F is the diagonal Fisher
    information of the calibration windows (or 1, with `sensitivity: none`), A and B are the best of their
    rank, Q is rounded to nearest on searched ranges. The cheapest choice is the solution of an integer program
    (LQ-LoRA, arXiv 2311.12023, section 3.2). Linears that are fused when served take one grid. Their ranks need not be
    the same: engines keep the adapters of what they fuse apart. One budget for both would not do: the estimate does not
    know how much trained adapters undo, and gives all linears the smallest rank.
    """

    def __init__(self, method: Method, params: QuantizeParams):
        self.method, self.params = method, params
        self.calibrated = params.calibrated
        self.adapted = method.adapted
        self.chosen: dict[int, dict[str, Choice]] = {}

    def survey(self, whole: Whole) -> dict[str, Tensor]:
        """The number of the choice of every linear among `choices`, and what the method itself wants to know.

        Raises:
            ApiqError: the model has no loss, a gradient is not finite, or no choice meets the target.
        """
        self._require_reachable(whole.stream.blocks.modules)
        offers: dict[str, list[Candidate]] = {}
        whole_shapes: dict[str, tuple[int, int]] = {}
        importance: dict[str, float] = {}
        for index, block, squares in self._blocks(whole):
            carriers = self._carriers(block)
            for name, linear in linears(block).items():
                W = linear.weight.detach().float()
                weights = separated(squares[name]) if name in squares else alike(W)
                importance[f"{index}.{name}"] = float(weights.importance)
                weights = weights if weights.importance else alike(W)
                offers[f"{index}.{name}"] = candidates(W, weights, self.params, name in carriers)
                whole_shapes[f"{index}.{name}"] = (linear.out_features, linear.in_features)
        chosen = divided(floored(offers, importance), self.params, whole_shapes)
        found = {f"choice.{name}": torch.tensor(number) for name, number in chosen.items()}
        if isinstance(self.method, Surveyor):
            found |= {f"method.{key}": value for key, value in self.method.survey(whole).items()}
        return found

    def surveyed(self, found: dict[str, Tensor]) -> None:
        """Take in what `survey` found."""
        options = choices(self.params)
        own: dict[str, Tensor] = {}
        for key, value in found.items():
            kind, _, name = key.partition(".")
            if kind == "method":
                own[name] = value
                continue
            index, _, linear = name.partition(".")
            self.chosen.setdefault(int(index), {})[linear] = options[int(value)]
        if isinstance(self.method, Surveyor):
            self.method.surveyed(own)

    def solve(self, problem: Problem) -> Solution:
        """Let the method solve the block on its grids, with adapters of its ranks."""
        chosen = self.chosen.get(problem.index, {})
        problem.grids = {name: choice.grid for name, choice in chosen.items()}
        if self.params.candidate_ranks:
            problem.ranks = {name: choice.rank for name, choice in chosen.items()}
        return self.method.solve(problem)

    def _require_reachable(self, blocks: Iterable[nn.Module]) -> None:
        """Divide the bits of linears that cost nothing: whether a target can be met, their shapes alone decide."""
        offers, whole_shapes = {}, {}
        for index, block in enumerate(unfuse(copy.deepcopy(block)) for block in blocks):
            carriers, costs = self._carriers(block), [0.0] * len(choices(self.params))
            for name, shape in shapes(linears(block)).items():
                offers[f"{index}.{name}"] = offered(shape, self.params, costs, name in carriers)
                whole_shapes[f"{index}.{name}"] = shape
        divided(offers, self.params, whole_shapes)

    def _carriers(self, block: nn.Module) -> Collection[str]:
        """The linears of a block that are to carry adapters."""
        return targets(self.params, shapes(linears(block)), strict=False) if self.adapted else ()

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
    """Size and cost of W (out, in) for each of `choices`, beside a low-rank part where it `carries` one.

    The low-rank part of a rank is the best one for W, and the same for all grids.
    """
    G, grids, ranks = torch.diag(weights.columns.square()), candidate_grids(params), _ranks(params)

    def costs(rest: Tensor) -> list[float]:
        return [float(weights.error(rest - _rounded(rest, grid, G))) for grid in grids]

    if not carries:
        return offered(W.shape, params, costs(W) * len(ranks), carries)
    A, B = weighted(W, torch.zeros_like(W), weights.rows, weights.columns, max(ranks))
    found = [cost for rank in ranks for cost in costs(W - B[:, :rank] @ A[:, :rank].t())]
    return offered(W.shape, params, found, carries)


def floored(offers: Mapping[str, list[Candidate]], importance: Mapping[str, float]) -> dict[str, list[Candidate]]:
    """The offers of all linears, where those of importance 0 come with the costs of 1: they get the least other one.

    Such are experts that no calibration token reaches: with costs of 0 they would take the fewest bits.
    """
    least = min((value for value in importance.values() if value), default=1.0)
    return {
        name: offer if importance[name] else [replace(each, cost=least * each.cost) for each in offer]
        for name, offer in offers.items()
    }


def offered(shape: tuple[int, ...], params: QuantizeParams, costs: Iterable[float], carries: bool) -> list[Candidate]:
    """The candidates of a weight of `shape` (out, in) that cost so much, in the order of `choices`."""
    sizes = {grid: packed_bits(shape, grid) for grid in candidate_grids(params)}
    counted = carries and params.candidate_ranks
    kinds = {grid: kind for kind, grid in enumerate(sizes)}
    return [
        Candidate(sizes[grid], cost, kinds[grid], rank * sum(shape) if counted else 0)
        for (grid, rank), cost in zip(choices(params), costs, strict=True)
    ]


def _rounded(W: Tensor, grid: Grid, G: Tensor) -> Tensor:
    """W (out, in) on `grid`, to nearest, on ranges that are searched where the levels are uniform."""
    if isinstance(grid, NormalFloat):
        return values(*nearest(W, grid), grid)
    s, z = searched(W, grid, G, [(share, share) for share in SHARES])
    return values(encode(W, s, z, grid), s, z, grid)


def divided(offers: Mapping[str, Sequence[Candidate]], params: QuantizeParams, shapes: Shapes) -> dict[str, int]:
    """The number of the candidate of each linear, by names and shapes (out, in) of all.

    A weight takes `target_bits` in the mean, or a little less; all adapters together hold no more numbers than with
    `rank` everywhere.

    Raises:
        ApiqError: the smallest candidates take more, or the largest clearly less.
    """
    target = math.inf if params.target_bits is None else params.target_bits
    weights = sum(math.prod(shape) for shape in shapes.values())
    most = sum(max(candidate.size for candidate in offer) for offer in offers.values()) / weights
    if params.target_bits is not None and most < target - SHORT:
        raise ApiqError(
            f"quantize.target_bits is {target}, but the largest candidates take {most:.4g} bits a weight; lower it, or "
            "add more bits or smaller groups to candidate_bits and candidate_group_sizes."
        )
    carriers = [shapes[name] for name, offer in offers.items() if offer[0].adapter]
    room = params.rank * sum(sum(shape) for shape in carriers)
    try:
        return allocate(offers, target * weights, tied(offers), room or math.inf)
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


def choices(params: QuantizeParams) -> list[Choice]:
    """The grids and ranks that each linear is offered, rank by rank."""
    return [Choice(grid, rank) for rank in _ranks(params) for grid in candidate_grids(params)]


def _ranks(params: QuantizeParams) -> list[int]:
    return list(dict.fromkeys(params.candidate_ranks or [params.rank]))


def candidate_grids(params: QuantizeParams) -> list[Grid]:
    """The grids among which a target of bits is met; without a target the one of all linears."""
    if params.target_bits is None:
        return [grid_of(params)]
    return [
        grid_of(params.model_copy(update={"bits": bits, "group_size": group_size}))
        for bits in params.candidate_bits
        for group_size in params.candidate_group_sizes
    ]
