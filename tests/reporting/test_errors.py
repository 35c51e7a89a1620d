"""Errors as the page shows them, from the file that the evaluation writes."""

import pytest

from apiq.errors import ApiqError
from apiq.evaluation.errors import Errors, write_errors
from apiq.reporting import drawing, error_figures
from apiq.reporting.error_lines import Line, activation_panels, gains, mean_share, weight_panels
from apiq.reporting.error_section import error_section, errors_table
from apiq.reporting.errors import BLOCK, read_errors
from apiq.reporting.gather import Folders, Run

FOUND = {
    "rtn": [Errors(0, "block", None, None, None, 2.0, 0.5, 1.5), Errors(0, "mlp.up", 4.0, 3.0, None, 2.0, 0.5, 1.0)],
    "quantized": [
        Errors(0, "block", None, None, None, 2.0, 0.25, 0.75),
        Errors(0, "mlp.up", 4.0, 2.0, 1.0, 2.0, 0.25, 0.5),
        Errors(1, "mlp.up", 8.0, 2.0, float("inf"), 2.0, 0.25, 0.5),
    ],
}


@pytest.fixture
def errors(tmp_path):
    write_errors(tmp_path / "errors.csv", FOUND)
    return read_errors(tmp_path / "errors.csv")


def test_what_was_measured_is_read(errors):
    assert [(row.model, row.block, row.kind) for row in errors] == [
        ("rtn", 0, BLOCK), ("rtn", 0, "mlp.up"), ("quantized", 0, BLOCK), ("quantized", 0, "mlp.up"),
        ("quantized", 1, "mlp.up"),
    ]  # fmt: skip
    assert errors[3].weight_error == 1.0
    assert errors[4].weight_error_with is None  # infinity is no number to draw


def test_the_lines_are_those_of_figures_3_4_and_a_1(errors):
    assert weight_panels(errors) == {
        "mlp.up": [
            Line("round to nearest", "rtn", False, ((0, 3.0),)),
            Line("quantized, without adapters", "quantized", True, ((0, 2.0), (1, 2.0))),
            Line("quantized", "quantized", False, ((0, 1.0), (1, 2.0))),
        ]
    }
    panels = activation_panels(errors)
    assert list(panels) == [BLOCK, "mlp.up"]
    assert [line.points for line in panels[BLOCK]] == [((0, 1.5),), ((0, 0.25),), ((0, 0.75),)]
    assert gains(errors) == {"mlp.up": ((0, 2.0),)}  # rounded 3, quantized 1; block 1 was not rounded


def test_without_adapters_a_quantized_model_has_one_line(tmp_path):
    write_errors(tmp_path / "errors.csv", {"quantized": [Errors(0, "up", 4.0, 2.0)]})
    found = read_errors(tmp_path / "errors.csv")
    assert [line.label for line in weight_panels(found)["up"]] == ["quantized"]
    assert gains(found) == activation_panels(found) == {}


def test_experts_of_a_block_are_one_kind_and_their_mean(tmp_path):
    rows = [Errors(0, f"mlp.experts.{expert}.down_proj", 2.0, 1.0 + expert) for expert in range(3)]
    write_errors(tmp_path / "errors.csv", {"quantized": rows})
    (line,) = weight_panels(read_errors(tmp_path / "errors.csv"))["mlp.experts.down_proj"]
    assert line.points == ((0, 2.0),)


def test_shares_are_means_over_the_blocks(errors):
    assert mean_share(errors, "quantized", "mlp.up", lambda row: row.weight_error, lambda row: row.weight_norm) == 0.25
    assert mean_share(errors, "absent", "mlp.up", lambda row: row.weight_error, lambda row: row.weight_norm) is None
    block, up = errors_table(errors).groups[0][1]
    assert [entry.text for entry in up] == ["mlp.up", "0.7500", "0.3750", "0.2500", "0.5000", "0.2500"]
    assert [entry.text for entry in block] == ["block", "—", "—", "—", "0.7500", "0.3750"]


@pytest.mark.parametrize("width", [drawing.WIDE, drawing.NARROW])
def test_each_kind_of_linear_has_a_panel(width, errors):
    figure = error_figures.error_panels(activation_panels(errors), "norm", width)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in drawn] == ["block", "up"]
    assert [len(axes.lines) for axes in drawn] == [3, 3]
    assert [line.get_linestyle() for line in drawn[0].lines] == ["-", "--", "-"]
    assert all(axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0 for axes in drawn)


def test_a_baseline_that_hides_the_method_makes_the_scales_logarithmic():
    lines = [Line("rtn", "rtn", False, ((0, 50.0), (1, 90.0))), Line("q", "quantized", False, ((0, 1.0), (1, 2.0)))]
    figure = error_figures.error_panels({"a": lines, "b": lines[1:]}, "norm", drawing.WIDE)
    assert [axes.get_yscale() for axes in figure.axes if axes.axison] == ["log", "log"]


def test_gains_are_named_at_their_right_end():
    figure = error_figures.gains({"mlp.up": ((0, 1.0), (1, 2.0)), "mlp.down": ((0, 1.0), (1, 2.0))}, drawing.WIDE)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["up", "down"]
    assert abs(axes.texts[0].xyann[1] - axes.texts[1].xyann[1]) == pytest.approx(10)


def test_what_is_not_drawn_is_told(errors, tmp_path):
    shown = error_section(Run(Folders(), errors=errors))
    assert [drawing.name for drawing in shown.drawings] == ["weight_gains", "weight_errors", "activation_errors"]
    assert shown.absent == []
    write_errors(tmp_path / "weights.csv", {"quantized": [Errors(0, "up", 4.0, 2.0)]})
    run = Run(Folders(), quantization={"method": "awq"}, errors=read_errors(tmp_path / "weights.csv"))
    shown = error_section(run)
    assert [drawing.name for drawing in shown.drawings] == ["weight_errors"]
    assert [sentence.split(":")[0] for sentence in shown.absent] == [
        "Rounding to nearest was not measured",
        "No activations were compared",
        "Factors that the method moved between linears and norms are in the errors of these linears.",
    ]
    shown = error_section(Run(Folders()))
    assert (shown.drawings, shown.absent) == ((), ["evaluate.errors is off: none were measured."])


@pytest.mark.parametrize(
    ("content", "said"),
    [("model,block\n", "no column linear"), ("{head}\nq,0,up,oops,,,,,\n", "'oops' in column weight_norm")],
)
def test_a_damaged_file_is_refused(tmp_path, content, said):
    write_errors(tmp_path / "errors.csv", {})
    head = (tmp_path / "errors.csv").read_text().strip()
    (tmp_path / "errors.csv").write_text(content.replace("{head}", head))
    with pytest.raises(ApiqError, match=said):
        read_errors(tmp_path / "errors.csv")
