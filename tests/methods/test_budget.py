"""The budget is divided as well as by trying every choice, and is never overdrawn."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apiq.methods import build
from apiq.methods.budget import GAP, BudgetTooSmall, Candidate, allocate
from apiq.methods.budgeted import Budgeted, candidate_grids
from apiq.methods.grid import packed_bits
from apiq.params import QuantizeParams

KINDS = (0, 0, 1)
CANDIDATES = st.tuples(
    *(
        st.builds(
            Candidate, st.integers(1, 50), st.floats(0, 100, allow_subnormal=False), st.just(kind), st.integers(1, 9)
        )
        for kind in KINDS
    )
)


def spent(candidates, chosen):
    picked = [candidates[name][number] for name, number in chosen.items()]
    return sum(each.size for each in picked), sum(each.cost for each in picked)


def held(candidates, chosen):
    return sum(candidates[name][number].adapter for name, number in chosen.items())


def best_by_trying(candidates, budget, tied=(), room=math.inf):
    costs = []
    for numbers in itertools.product(range(3), repeat=len(candidates)):
        chosen = dict(zip(candidates, numbers, strict=True))
        size, cost = spent(candidates, chosen)
        if (
            size <= budget
            and held(candidates, chosen) <= room
            and all(len({KINDS[chosen[name]] for name in names}) == 1 for names in tied)
        ):
            costs.append(cost)
    return min(costs)


@settings(deadline=None, max_examples=25)
@given(st.lists(CANDIDATES, min_size=1, max_size=5), st.floats(0, 1), st.booleans())
def test_it_costs_as_little_as_the_best_of_all_choices(offers, share, tie):
    candidates = {f"{number}.linear": offer for number, offer in enumerate(offers)}
    tied = [list(candidates)[:2]] if tie else []
    groups = [*tied, *([name] for name in candidates if not any(name in names for names in tied))]
    least = sum(
        min(
            sum(min(each.size for each in candidates[name] if each.kind == kind) for name in names)
            for kind in set(KINDS)
        )
        for names in groups
    )
    most = sum(max(each.size for each in offer) for offer in offers)
    with pytest.raises(BudgetTooSmall):
        allocate(candidates, least - 0.5, tied)
    budget = least + share * (most - least)
    chosen = allocate(candidates, budget, tied)
    size, cost = spent(candidates, chosen)
    assert size <= budget
    assert all(len({KINDS[chosen[name]] for name in names}) == 1 for names in tied)
    top = max(each.cost for offer in offers for each in offer) * max(1, len(tied[0]) if tied else 1)
    assert cost <= best_by_trying(candidates, budget, tied) * (1 + GAP) + 1e-5 * top


@settings(deadline=None, max_examples=25)
@given(st.lists(CANDIDATES, min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_adapters_stay_within_their_room_at_the_least_cost(offers, share, part):
    """Every linear may have its smallest size with its smallest adapter, as where grids and ranks are crossed."""
    candidates = {}
    for number, offer in enumerate(offers):
        least = Candidate(min(each.size for each in offer), 100.0, 0, min(each.adapter for each in offer))
        candidates[f"{number}.linear"] = (least, *offer[1:])
    smallest, largest = (
        sum(bound(each.adapter for each in offer) for offer in candidates.values()) for bound in (min, max)
    )
    most = sum(max(each.size for each in offer) for offer in candidates.values())
    least = sum(min(each.size for each in offer) for offer in candidates.values())
    budget, room = least + share * (most - least), smallest + round(part * (largest - smallest))
    chosen = allocate(candidates, budget, room=room)
    size, cost = spent(candidates, chosen)
    assert size <= budget and held(candidates, chosen) <= room
    assert cost <= best_by_trying(candidates, budget, room=room) * (1 + GAP) + 1e-3
    with pytest.raises(ValueError, match="smallest adapters"):
        allocate(candidates, most, room=smallest - 0.5)


def test_bits_go_where_an_error_costs_most():
    sizes = (200, 300, 400)
    candidates = {
        name: [Candidate(size, weight * 4.0 ** -(size // 100), size) for size in sizes]
        for name, weight in {"dear": 100.0, "usual": 10.0, "cheap": 1.0}.items()
    }
    assert allocate(candidates, 900) == {"dear": 2, "usual": 1, "cheap": 0}
    assert allocate(candidates, 900, tied=[("dear", "cheap")]) == {"dear": 1, "usual": 1, "cheap": 1}


def test_a_budget_below_the_smallest_choice_is_refused():
    with pytest.raises(BudgetTooSmall) as refused:
        allocate({"a": [Candidate(5, 1.0, 0), Candidate(4, 2.0, 1)], "b": [Candidate(3, 1.0, 0)]}, 6.9)
    assert refused.value.least == 7


def test_hundreds_of_linears_are_divided_at_once():
    candidates = {
        f"{number}": [Candidate(1000 * bits + number, (1 + number % 7) * 4.0**-bits, bits) for bits in (2, 3, 4)]
        for number in range(448)
    }
    chosen = allocate(candidates, 448 * 2750)
    size, cost = spent(candidates, chosen)
    uniform = spent(candidates, dict.fromkeys(candidates, 0))
    assert uniform[0] < size <= 448 * 2750
    assert size > 0.999 * 448 * 2750
    assert cost < 0.5 * uniform[1]


def test_a_linear_without_importance_counts_like_the_least_important_one(monkeypatch):
    """As an expert that no calibration token reaches: it may be reached later."""
    block = nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in ("least", "more", "unreached")})
    importance = {"least": 1e-6, "more": 1e-3, "unreached": 0.0}
    squares = {name: torch.full((32, 32), value) for name, value in importance.items()}
    for name in ("more", "unreached"):
        block[name].weight.data = block["least"].weight.data
    monkeypatch.setattr(Budgeted, "_blocks", lambda self, whole: iter([(0, block, squares)]))
    offer = {"candidate_bits": [2, 3, 4], "candidate_group_sizes": [16]}
    sizes = [packed_bits((32, 32), grid) / 32**2 for grid in candidate_grids(QuantizeParams(target_bits=4.0, **offer))]
    params = QuantizeParams(method="rtn", target_bits=(2 * sizes[1] + sizes[2]) / 3 + 1e-6, **offer)
    stream = SimpleNamespace(blocks=SimpleNamespace(modules=[block]))
    found = build(params).survey(SimpleNamespace(stream=stream))
    assert {name: int(found[f"choice.0.{name}"]) for name in block} == {"least": 1, "more": 2, "unreached": 1}
