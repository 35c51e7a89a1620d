"""Nested parameters: single keys set, leaves listed."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiq.errors import ApiqError
from apiq.overrides import assign, leaves

keys = st.text("abc", min_size=1, max_size=3)
sections = st.recursive(st.integers(), lambda below: st.dictionaries(keys, below, min_size=1, max_size=3))
nested = st.dictionaries(keys, st.dictionaries(keys, sections, min_size=1, max_size=3), min_size=1, max_size=3)


@given(nested)
def test_leaves_set_one_by_one_make_the_whole(values):
    built: dict = {}
    assign(built, leaves(values))
    assert built == values


def test_what_is_assigned_is_not_changed_by_what_is_assigned_below_it():
    given_ones = {"a.b": {"c": 1}, "a.b.d": 2}
    before = copy.deepcopy(given_ones)
    values: dict = {}
    assign(values, given_ones)
    assert values == {"a": {"b": {"c": 1, "d": 2}}}
    assert given_ones == before


@pytest.mark.parametrize("path", ["bits", "", "quantize.", ".bits"])
def test_a_key_without_its_section_is_refused(path):
    with pytest.raises(ApiqError, match=r"is not of the form section\.key"):
        assign({}, {path: 3})
