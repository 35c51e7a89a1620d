"""Names in a crowded scatter are all readable, and cells of one kind can be one mark."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from apiq.reporting.drawing import WIDE
from apiq.sweeps.cells import Cell
from apiq.sweeps.figure import Mark, marks, picture
from apiq.sweeps.file import FigureSpec, Sweep
from apiq.sweeps.outcome import Outcome

SPEC = FigureSpec(kind="scatter", x="effective_bits", y="perplexity", log_y=True)
POINTS = st.tuples(st.floats(2, 10), st.floats(2, 30))
NAMES = ["rtn", "gptq-lora", "apiq-bw, recipe best", "loftq, 5 steps"]


@settings(max_examples=10, deadline=None)
@given(st.lists(POINTS, min_size=2, max_size=16))
def test_no_name_covers_another_or_leaves_the_axes_below(points):
    marks = [Mark("", "", x, y, NAMES[number % 4]) for number, (x, y) in enumerate(points)]
    figure = picture(SPEC, marks, WIDE)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_tightbbox() for text in axes.texts]
    assert len(boxes) == len(points)
    for one, other in itertools.combinations(boxes, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        down = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across < 1 or down < 2, "but for the tails of letters"
    assert min(box.y0 for box in boxes) > axes.bbox.y0 - 2


@pytest.mark.parametrize("kind", ["scatter", "bar", "line"])
def test_cells_that_differ_in_their_seed_are_one_mark_with_its_range(kind, tmp_path):
    x = "rung" if kind == "bar" else "cost"
    sweep = Sweep.model_validate({
        "title": "t", "grid": {"rung": {"low": {}, "high": {}}, "seed": {"0": {}, "1": {}, "2": {}}},
        "table": {"rows": ["rung"], "metrics": {"loss": "loss"}},
        "figure": {"kind": kind, "x": x, "y": "loss", "mean_over": "seed", "log_x": kind != "bar", "log_y": True},
    })  # fmt: skip
    losses, costs = {"low": [1.0, 2.0, 6.0], "high": [3.0, 3.0, 9.0]}, {"low": [10, 20, 30], "high": [40, 40, 40]}
    cells = [
        (Cell("c", {"rung": rung, "seed": str(seed)}, {}, {}), Outcome("done", None, {"loss": loss, "cost": cost}))
        for rung in losses
        for seed, (loss, cost) in enumerate(zip(losses[rung], costs[rung], strict=True))
    ]
    found = marks(sweep, cells, tmp_path)
    assert [(mark.name, mark.y, mark.low, mark.high) for mark in found] == [("low", 3, 1, 6), ("high", 5, 3, 9)]
    assert [mark.x for mark in found] == (["low", "high"] if kind == "bar" else [20, 40])
    assert sweep.figure is not None
    figure = picture(sweep.figure, found, WIDE)
    ranges = [line.get_segments()[0][:, 1].tolist() for line in figure.axes[0].collections]
    assert ranges == [[1, 6], [3, 9]]


@pytest.mark.parametrize("wrong", [{"mean_over": "seeds"}, {"mean_over": "rung", "data": "errors"}])
def test_the_mean_is_over_cells_and_an_axis_of_the_grid(wrong):
    with pytest.raises(ValidationError, match=r"figure\.mean_over"):
        Sweep.model_validate({
            "title": "t", "grid": {"rung": {"low": {}}}, "table": {"rows": ["rung"], "metrics": {"loss": "loss"}},
            "figure": {"kind": "bar", "x": "rung", "y": "loss", **wrong},
        })  # fmt: skip


def test_what_has_no_logarithm_is_left_out_of_a_logarithmic_figure(tmp_path):
    values = {"title": "t", "grid": {"rung": {"a": {}, "b": {}, "c": {}}},
              "table": {"rows": ["rung"], "metrics": {"loss": "loss"}}}  # fmt: skip
    losses = {"a": 0.5, "b": -0.001, "c": 0.0}
    for log, expected in ((True, ["a"]), (False, ["a", "b", "c"])):
        sweep = Sweep.model_validate({**values, "figure": {"kind": "scatter", "x": "cost", "y": "loss", "log_y": log}})
        cells = [
            (Cell(rung, {"rung": rung}, {}, {}), Outcome("done", None, {"loss": loss, "cost": 1.0}))
            for rung, loss in losses.items()
        ]
        assert [mark.name for mark in marks(sweep, cells, tmp_path)] == expected
