import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiq.reporting import drawing
from apiq.reporting.gather import Folders, Run
from apiq.reporting.pareto import THIS, Point, collect, frontier, frontiers, points
from apiq.reporting.pareto_figure import pareto
from apiq.reporting.sweeps import read_sweeps
from tests.reporting.made import cell, sweep

VALUES = st.integers(0, 6).map(float)
POINTS = st.lists(st.builds(Point, st.uuids().map(str), st.just("quantized"), VALUES, VALUES), max_size=12)


def beats(one, other):
    return one.bits <= other.bits and one.loss <= other.loss and (one.bits, one.loss) != (other.bits, other.loss)


@given(POINTS)
def test_the_frontier_is_what_nothing_beats(found):
    best = frontier(found)
    unbeaten = [point for point in found if not any(beats(other, point) for other in found)]
    assert {(point.bits, point.loss) for point in best} == {(point.bits, point.loss) for point in unbeaten}
    assert all(point in unbeaten for point in best)
    assert [point.bits for point in best] == sorted({point.bits for point in best})
    assert [point.loss for point in best] == sorted({point.loss for point in best}, reverse=True)


@given(POINTS)
def test_the_frontier_does_not_depend_on_the_order(found):
    corners = [[(point.bits, point.loss) for point in frontier(each)] for each in (found, found[::-1])]
    assert corners[0] == corners[1]


def test_finetuned_models_have_a_frontier_of_their_own():
    found = [Point("a", "quantized", 3.0, 0.5), Point("a", "finetuned", 3.0, 0.1), Point("a", "rtn", 2.0, 0.9)]
    assert frontiers(found) == {False: [found[2], found[0]], True: [found[1]]}


def test_a_loss_is_the_mean_over_all_texts_and_needs_bits():
    evaluation = {
        "full": {"perplexity": {"a": 1.0, "b": 2.0}},
        "quantized": {"perplexity": {"a": math.e, "b": 2 * math.e**3}},
        "finetuned": {"perplexity": {"a": 1.0}},
        "rtn": {"perplexity": {"a": 9.0, "b": 9.0}},
    }
    (point,) = points("run", evaluation, 2.5)
    assert (point.model, point.bits, point.loss) == ("quantized", 2.5, pytest.approx(2.0))
    assert points("run", evaluation, None) == []
    evaluation["quantized"]["effective_bits"] = 2.0
    assert points("run", evaluation, 2.5)[0].bits == 2.0


@pytest.fixture
def run(tmp_path):
    """A run beside a sweep of four cells: one like it, one that failed, one of another model, one without bits."""
    other = cell("apiq-bw", 4, (8.0, 9.0), 3.0)
    other["metrics"] |= {"full.perplexity.wiki": 5.0}
    unknown = cell("apiq-bw", 32, (8.0, 2.5), None)
    cells = [
        cell("loftq", 8, (14.7782, 4.0), 3.5, finetuned=1),
        cell("qlora", 8, status="failed", error="no"),
        other,
        unknown,
    ]
    cells[0]["metrics"] |= {"finetuned.perplexity.wiki": 7.3891, "finetuned.perplexity.demo": 2.0}
    sweep(tmp_path, cells)
    evaluation = {
        "full": {"perplexity": {"wiki": 7.3891, "demo": 2.0}},
        "rtn": {"perplexity": {"wiki": 73.891, "demo": 20.0}, "effective_bits": 2.5},
        "quantized": {"perplexity": {"wiki": 14.7782, "demo": 2.0}},
    }
    return Run(Folders(), quantization={"effective_bits": 3.25}, evaluation=evaluation, sweeps=read_sweeps(tmp_path))


def test_only_losses_against_the_same_model_on_the_same_texts_stand_in_one_plot(run):
    groups = collect(run)
    assert list(groups) == [(("demo", 2.0), ("wiki", 7.3891)), (("demo", 2.0), ("wiki", 5.0))]
    own, other = groups.values()
    name = "Rank & <method>: loftq, 8"
    assert [(point.run, point.model, point.bits) for point in own] == [
        (THIS, "rtn", 2.5),
        (THIS, "quantized", 3.25),
        (name, "quantized", 3.5),
        (name, "finetuned", 3.5),
    ]
    assert [point.loss for point in own] == pytest.approx([math.log(10), math.log(2) / 2, math.log(2), 0.0])
    assert [point.run for point in other] == ["Rank & <method>: apiq-bw, 4"]


def test_equal_points_are_given_once(run):
    twice = Run(Folders(), quantization=run.quantization, evaluation=run.evaluation, sweeps=(*run.sweeps, *run.sweeps))
    assert collect(twice) == collect(run)


@pytest.mark.parametrize("width", [drawing.WIDE, drawing.NARROW])
def test_corners_of_the_frontiers_are_numbered_and_the_stairs_lead_over_them(width):
    found = [
        Point(THIS, "rtn", 2.0, 1.0),
        Point(THIS, "quantized", 3.0, 0.5),
        Point("sweep", "quantized", 3.5, 0.7),
        Point(THIS, "finetuned", 3.0, 0.2),
    ]
    (axes,) = pareto(found, width).axes
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        ("1", (2.0, 1.0)),
        ("2", (3.0, 0.5)),
        ("3", (3.0, 0.2)),
    ]
    stairs = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_xydata()[:-1].tolist() for line in stairs] == [[[2, 1], [3, 0.5]], [[3, 0.2]]]
    labels = [line.get_label() for line in axes.lines]
    assert "quantized, in a sweep" in labels and "finetuned, in a sweep" not in labels
    assert axes.get_yscale() == "log"


def test_a_gain_on_full_precision_needs_a_linear_scale():
    (axes,) = pareto([Point(THIS, "quantized", 3.0, -0.1)], drawing.WIDE).axes
    assert axes.get_yscale() == "linear"
