"""Which candidate each linear takes under two budgets: a multiple-choice knapsack problem, as an integer program.

    minimise sum_i sum_c cost_ic x_ic   with   sum_i sum_c size_ic x_ic <= budget,  sum_i sum_c adapter_ic x_ic <= room,
                                               sum_c x_ic = 1,  x_ic in {0, 1}

Linears that are tied take candidates of one kind: sum_{c of kind k} x_ic is the same for each of them. LQ-LoRA
(arXiv 2311.12023), section 3.2, solved by HiGHS through scipy.
"""

from __future__ import annotations

import math
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
    """Bits that it takes, adapters not counted."""
    cost: float
    """What is lost by it, in units that are the same for all linears; not negative."""
    kind: int
    """What tied linears must have in common: the number of a grid."""
    adapter: int = 0
    """Numbers in its adapter."""


class BudgetTooSmall(ValueError):
    """The smallest candidates of all linears together take `least` bits, which is more than the budget."""

    def __init__(self, least: int):
        super().__init__(f"at least {least} bits are needed")
        self.least = least


def allocate(
    candidates: Mapping[str, Sequence[Candidate]],
    budget: float,
    tied: Iterable[Sequence[str]] = (),
    room: float = math.inf,
) -> dict[str, int]:
    """The number of the candidate that each linear takes: the least sum of costs in `budget` bits, adapters in `room`.

    Linears named together in `tied` (query, key and value; gate and up) take candidates of one kind. Every size is
    to be offered with an adapter so small that all have room.

    Raises:
        BudgetTooSmall: not even the smallest candidates fit.
        ValueError: tied linears have candidates of different kinds, or the smallest adapters have no room.
    """
    together = [names for names in ([name for name in names if name in candidates] for names in tied) if len(names) > 1]
    least = _least(candidates, together)
    if least > budget:
        raise BudgetTooSmall(least)
    offers = [each for offer in candidates.values() for each in offer]
    spent = np.array([[each.size for each in offers], [each.adapter for each in offers]]) / [[budget], [room]]
    costs = np.array([each.cost for each in offers])
    owner = np.repeat(np.arange(len(candidates)), [len(offer) for offer in candidates.values()])
    smallest = sum(min(each.adapter for each in offer) for offer in candidates.values())
    if smallest > room:
        raise ValueError(f"the smallest adapters hold {smallest} numbers, and there is room for {room}")
    floors = np.array([least / budget, smallest / room])
    for slack in (0.0, SLACK):
        chosen = _solved(spent, np.maximum(1 - slack, floors), costs, owner, _ties(candidates, together))
        if (spent[:, chosen].sum(1) <= 1).all():
            break
    first = np.searchsorted(owner, np.arange(len(candidates)))
    return dict(zip(candidates, (chosen - first).tolist(), strict=True))


def _solved(
    spent: np.ndarray, limits: np.ndarray, costs: np.ndarray, owner: np.ndarray, ties: list[tuple[int, int, int]]
) -> np.ndarray:
    """Which variable is 1 for each linear, where each spends shares (2, variables) of what `limits` (2) bounds."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes long to import, and few runs need it
    from scipy.sparse import csr_array

    variables = np.arange(len(owner))
    choose_one = csr_array((np.ones(len(owner)), (owner, variables)))
    constraints = [LinearConstraint(choose_one, 1, 1), LinearConstraint(spent / limits[:, None], ub=1)]
    if ties:
        row, column, sign = np.array(ties).T
        alike = csr_array((sign.astype(float), (row, column)), shape=(row.max() + 1, len(owner)))
        constraints.append(LinearConstraint(alike, 0, 0))
    found = milp(
        costs / max(costs.max(), np.finfo(float).tiny),
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, found.message  # the smallest candidates are a solution
    return np.array([variables[owner == linear][found.x[owner == linear].argmax()] for linear in range(owner[-1] + 1)])


def _least(candidates: Mapping[str, Sequence[Candidate]], together: Sequence[Sequence[str]]) -> int:
    """The bits of the smallest choice.

    Raises:
        ValueError: tied linears have candidates of different kinds.
    """
    least = {name: _smallest(offer) for name, offer in candidates.items()}
    for names in together:
        kinds = least[names[0]].keys()
        if any(least[name].keys() != kinds for name in names):
            raise ValueError(f"the linears {', '.join(names)} are tied and have candidates of different kinds")
        best = min(kinds, key=lambda kind: sum(least[name][kind] for name in names))
        least.update({name: {best: least[name][best]} for name in names})
    return sum(min(sizes.values()) for sizes in least.values())


def _smallest(offer: Iterable[Candidate]) -> dict[int, int]:
    """The bits of the smallest candidate of each kind."""
    sizes: dict[int, int] = {}
    for each in offer:
        sizes[each.kind] = min(each.size, sizes.get(each.kind, each.size))
    return sizes


def _ties(
    candidates: Mapping[str, Sequence[Candidate]], together: Iterable[Sequence[str]]
) -> list[tuple[int, int, int]]:
    """Row, column and sign of the entries of the equations that tie linears: one for each kind and pair."""
    numbers = iter(range(sum(len(offer) for offer in candidates.values())))
    columns = {name: [(next(numbers), each.kind) for each in offer] for name, offer in candidates.items()}
    entries, row = [], 0
    for first, *others in together:
        for other in others:
            for kind in sorted({kind for _, kind in columns[first]}):
                for name, sign in ((first, 1), (other, -1)):
                    entries += [(row, column, sign) for column, own in columns[name] if own == kind]
                row += 1
    return entries
