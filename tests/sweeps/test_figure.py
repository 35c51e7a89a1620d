"""Names in a crowded scatter are all readable."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from apiq.reporting.drawing import WIDE
from apiq.sweeps.figure import Mark, picture
from apiq.sweeps.file import FigureSpec

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
