import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from apiq.reporting import drawing, figures, histograms, palette
from apiq.reporting.gather import BlockLoss, Curve, TrainingLog
from apiq.reporting.weights import Histogram, LinearShape

WIDTHS = pytest.mark.parametrize("width", [drawing.WIDE, drawing.NARROW])


def texts(axes):
    return [text.get_text() for text in axes.texts]


def bars(axes):
    return [patch.get_width() for patch in axes.patches]


@WIDTHS
def test_perplexities_are_marked_and_written_at_their_place(width):
    lost = {"wiki": {"quantized": 1.0, "finetuned": 0.5}, "demo": {"quantized": 2.0}}
    figure = figures.perplexities(lost, {"full": "full", "quantized": "q", "finetuned": "f"}, width)
    (axes,) = figure.axes
    assert texts(axes) == ["+1.0000", "+0.5000", "+2.0000"]
    marked = {
        line.get_xydata()[0].tolist()[0] for line in axes.lines if line.get_marker() in "oD" and len(line.get_xdata())
    }
    assert marked == {0.5, 1.0, 2.0}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["wiki", "demo"]


def test_blocks_join_before_and_after_and_leave_out_what_a_log_scale_cannot_show():
    losses = [BlockLoss(0, 4.0, 1.0), BlockLoss(1, None, 2.0), BlockLoss(2, 3.0, 0.0)]
    (axes,) = figures.block_losses(losses, drawing.WIDE).axes
    assert len(axes.collections) == 1
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "before fitting": [[0, 4], [2, 3]],
        "after fitting": [[0, 1], [1, 2]],
    }
    assert axes.get_yscale() == "log"


def test_blocks_that_were_only_rounded_have_one_series():
    (axes,) = figures.block_losses([BlockLoss(0, 1.0, 1.0), BlockLoss(1, 2.0, 2.0)], drawing.WIDE).axes
    assert [line.get_label() for line in axes.lines] == ["after rounding"]


@WIDTHS
def test_curves_of_single_linears_get_a_panel_each(width):
    groups = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    curves = [Curve(block, group, (0, 1), (2.0 + block, 1.0)) for block in range(4) for group in groups]
    figure = figures.loss_curves(curves, width)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in drawn] == ["q_proj", "o_proj", "up_proj"]
    assert [len(axes.lines) for axes in drawn] == [4, 4, 4]
    assert all(texts(axes) == ["0", "3"] for axes in drawn)


def test_few_curves_of_blocks_are_all_named_and_many_at_the_ends():
    few = [Curve(block, "block", (0, 1), (2.0, 1.0 + block)) for block in range(3)]
    (axes,) = figures.loss_curves(few, drawing.WIDE).axes
    assert texts(axes) == ["block 0", "1", "2"]
    many = [Curve(block, "block", (0, 1), (2.0, 1.0 + block)) for block in range(80)]
    (axes,) = figures.loss_curves(many, drawing.WIDE).axes
    assert len(axes.lines) == 80
    assert texts(axes) == ["block 0", "79"]


def test_names_of_lines_that_end_together_do_not_overlap():
    curves = [Curve(block, "block", (0, 1), (2.0, 1.0)) for block in range(5)]
    (axes,) = figures.loss_curves(curves, drawing.WIDE).axes
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert np.diff(heights) == pytest.approx(10)


def test_bits_are_stacked_to_their_sum():
    parts = {"codes": 2.0, "scales": 0.5, "adapters": 1.25}
    (axes,) = figures.effective_bits(parts, {name: name for name in parts}, drawing.WIDE).axes
    assert bars(axes) == [2.0, 0.5, 1.25]
    assert [patch.get_x() for patch in axes.patches] == [0, 2.0, 2.5]
    assert texts(axes) == ["3.750"]


@WIDTHS
def test_costs_leave_a_gap_for_what_was_not_measured(width):
    time, space = figures.cost({"model": 125.0, "evaluate": 4.0}, {"model": 900.0}, width).axes
    assert (bars(time), texts(time)) == ([125.0, 4.0], ["2 min 05 s", "4.0 s"])
    assert (bars(space), texts(space)) == ([900.0], ["900 MiB"])


def test_finetuning_shows_both_losses_or_the_one_there_is():
    both = TrainingLog(((1, 2.5), (2, 2.25)), ((0, 2.75), (2, 2.125)))
    (axes,) = figures.finetuning(both, drawing.WIDE).axes
    assert (len(axes.lines), texts(axes)) == (2, ["training 2.250", "held out 2.125"])
    (axes,) = figures.finetuning(TrainingLog(((1, 2.5),), ()), drawing.WIDE).axes
    assert (len(axes.lines), texts(axes)) == (1, ["training 2.500"])


def shape(name, *adapters):
    histogram = Histogram(np.linspace(-1, 1, 4), np.array([0.25, 0.5, 0.25]))
    weights = {key: histogram for key in ("W", "Q")}
    return LinearShape(name, weights, dict.fromkeys(adapters, histogram), np.array([0.1, 0.4, 0.4, 0.1]), None, None)


@WIDTHS
def test_histograms_have_a_panel_for_each_linear(width):
    shapes = [shape(f"mlp.linear{number}", "A", "B") for number in range(3)]
    for draw, count in (
        (histograms.weight_histograms, 2),
        (histograms.adapter_histograms, 2),
        (histograms.code_histograms, 4),
    ):
        drawn = [axes for axes in draw(shapes, width).axes if axes.axison]
        assert [axes.get_title(loc="left") for axes in drawn] == ["linear0", "linear1", "linear2"]
        assert [len(axes.patches) for axes in drawn] == [count] * 3


def test_nearby_labels_move_apart_and_others_stay():
    assert drawing.apart([0, 1, 100], 10) == pytest.approx([-4.5, 5.5, 100])
    assert drawing.apart([5, 5, 5], 10) == pytest.approx([-5, 5, 15])
    assert drawing.apart([30, 0], 10) == [30, 0]
    assert drawing.apart([0, 1, 20, 100], 10, 5) == pytest.approx([5, 15, 25, 100])


def test_names_are_never_read_as_mathematics():
    figure = figures.perplexities({"a$_b$": {"quantized": 1.0}}, {"full": "f", "quantized": "$q$"}, drawing.WIDE)
    assert "a$_b$" in drawing.svg(figure)


def test_the_callers_style_neither_matters_nor_changes():
    def draw():
        return drawing.svg(figures.effective_bits({"codes": 2.0}, {"codes": "codes"}, drawing.WIDE))

    plain = draw()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "savefig.bbox": "tight"}):
        assert draw() == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_inline_figures_follow_the_theme_and_keep_their_names_apart():
    document = drawing.svg(figures.block_losses([BlockLoss(0, 4.0, 1.0)], drawing.WIDE))
    root = ElementTree.fromstring(drawing.inline(document, "one", "wide", 'errors <of> "blocks"'))
    names = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    used = [element.attrib["href"] for element in root.iter() if "href" in element.attrib]
    styles = " ".join(element.attrib.get("style", "") for element in root.iter())
    assert root.attrib["aria-label"] == 'errors <of> "blocks"'
    assert names and all(name.startswith("one-") for name in names)
    assert used and {reference.removeprefix("#") for reference in used} <= set(names)
    assert "var(--quantized)" in styles
    assert not any(light in styles for light, _ in palette.variables().values())


def test_every_colour_of_the_palette_has_one_meaning_and_reads_on_its_background():
    pairs = palette.variables()
    for side in (0, 1):
        shades = [to_hex(pair[side]) for pair in pairs.values()]
        assert len(set(shades)) == len(shades)
        for name in ("ink", "muted", "full", "baseline", "quantized", "finetuned"):
            assert contrast(pairs[f"--{name}"][side], pairs["--paper"][side]) >= 4.5, name


def contrast(one, other):
    """Ratio of relative luminances (WCAG 2.2)."""

    def luminance(shade):
        rgb = np.array([int(shade[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
