"""Which candidate each linear takes under a budget: the multiple-choice knapsack problem, as an integer program.

    minimise sum_i sum_c cost_ic x_ic   with   sum_i sum_c size_ic x_ic <= budget,  sum_c x_ic = 1,  x_ic in {0, 1}

LQ-LoRA (arXiv 2311.12023), section 3.2, solved by HiGHS through scipy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

GAP = 1e-4
"""Relative distance from the proven optimum at which the search may stop."""
SLACK = 1e-6
"""Share of the budget that is kept back: HiGHS takes a constraint for met within so much."""


@dataclass(frozen=True)
class Candidate:
    """What a linear may become."""

    size: int
    """Bits that it takes."""
    cost: float
    """What is lost by it, in units that are the same for all linears; not negative."""


class BudgetTooSmall(ValueError):
    """The smallest candidates of all linears together take `least` bits, which is more than the budget."""

    def __init__(self, least: int):
        super().__init__(f"at least {least} bits are needed")
        self.least = least


def allocate(
    candidates: Mapping[str, Sequence[Candidate]], budget: float, tied: Iterable[Sequence[str]] = ()
) -> dict[str, int]:
    """The number of the candidate that each linear takes, with the least sum of costs in `budget` bits.

    Linears named together in `tied` (query, key and value; gate and up) take candidates of one number.

    Raises:
        BudgetTooSmall: not even the smallest candidates fit.
        ValueError: tied linears have different numbers of candidates.
    """
    groups = _groups(candidates, tied)
    sizes, costs, owner, choice = (np.array(column) for column in zip(*_columns(candidates, groups), strict=True))
    least = sum(sizes[owner == group].min() for group in range(len(groups)))
    if least > budget:
        raise BudgetTooSmall(int(least))
    for slack in (0.0, SLACK):
        chosen = _solved(sizes / budget, costs, owner, max(1 - slack, least / budget))
        if sizes[chosen].sum() <= budget:
            break
    return {name: int(number) for names, number in zip(groups, choice[chosen], strict=True) for name in names}


def _solved(sizes: np.ndarray, costs: np.ndarray, owner: np.ndarray, budget: float) -> np.ndarray:
    """Which variable is 1 for each group."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes long to import, and few runs need it
    from scipy.sparse import csr_array

    variables = np.arange(len(owner))
    choose_one = csr_array((np.ones(len(owner)), (owner, variables)))
    found = milp(
        costs / max(costs.max(), np.finfo(float).tiny),
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(choose_one, 1, 1), LinearConstraint(sizes[None], ub=budget)],
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, found.message  # the smallest candidates are a solution
    return np.array([variables[owner == group][found.x[owner == group].argmax()] for group in range(owner[-1] + 1)])


def _groups(candidates: Mapping[str, Sequence[Candidate]], tied: Iterable[Sequence[str]]) -> list[list[str]]:
    """All linears, those that are tied together, in the order of the first of each group."""
    partners: dict[str, list[str]] = {}
    for names in tied:
        together = [name for name in names if name in candidates]
        partners.update({name: together for name in together})
    groups = {id(names): names for names in (partners.setdefault(name, [name]) for name in candidates)}
    return list(groups.values())


def _columns(
    candidates: Mapping[str, Sequence[Candidate]], groups: Iterable[Sequence[str]]
) -> Iterable[tuple[int, float, int, int]]:
    """Size, cost, group and number of the candidate of each variable x_ic."""
    for group, names in enumerate(groups):
        for number, alike in enumerate(zip(*(candidates[name] for name in names), strict=True)):
            yield sum(each.size for each in alike), sum(each.cost for each in alike), group, number
