"""What a sweep file may say, and the sentence for what it may not."""

import pytest

from apiq.errors import ApiqError
from apiq.sweeps.file import load_sweep


def test_values_become_choices_that_are_called_by_them(write):
    sweep = load_sweep(write())
    assert sweep.axes == ["quantize.bits", "method"]
    assert sweep.grid["quantize.bits"] == {"3": {"quantize.bits": 3}, "2": {"quantize.bits": 2}}
    assert sweep.table.metrics["perplexity"].metric == "quantized.perplexity.*"


def test_labels_that_yaml_reads_as_numbers_or_booleans_are_text(write, place):
    text = (place / write()).read_text().replace("[3, 2]", "{3: {quantize.bits: 3}, 2: {quantize.bits: 2}}")
    text += "refused: {too few: {quantize.bits: 2}}\n"
    sweep = load_sweep(write(text))
    assert list(sweep.grid["quantize.bits"]) == ["3", "2"]
    assert sweep.refused == {"too few": {"quantize.bits": ["2"]}}
    boolean = load_sweep(write(text.replace("3: {quantize.bits: 3}", "true: {quantize.symmetric: true}")))
    assert "true" in boolean.grid["quantize.bits"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("title: Small", "titel: Small", "small.yaml: title is missing."),
        ("source:", "sauce:", "sauce is not a parameter; did you mean source?"),
        ("rows: [method]", "rows: [methods]", "table.rows is 'methods'; it should be one of quantize.bits"),
        ("columns: quantize.bits", "columns: bits", "table.columns is 'bits'; it should be one of"),
        ("[2, bw, 7.59]", "[2, lw, 16.25]", "paper.rows is 'lw'; it should be one of rtn, bw, the choices of method."),
        ("[2, bw, 7.59]", "[2, bw]", "paper.rows is [2, 'bw']; it should be 2 labels (quantize.bits, method) and 1"),
        ("[3, 2]", "[]", "grid.quantize.bits is 'empty'; it should be at least one choice."),
        ("paper:", "refused: {why: {method: lw}}\npaper:", "refused.why is 'lw'; it should be one of rtn, bw"),
        ("paper:", "keep: [a/metrics.json, b/metrics.json]\npaper:", "keep is 'a/metrics.json'; it should be a"),
        ("paper:", "figure: {kind: pie, x: method, y: a}\npaper:", "figure.kind is 'pie'; it should be line, bar or"),
        ("paper:", "figure: {kind: bar, x: method, y: a, series: b}\npaper:", "figure.series is 'b'; it should be"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_sentence(write, place, old, new, told):
    text = (place / write()).read_text()
    assert old in text
    with pytest.raises(ApiqError) as caught:
        load_sweep(write(text.replace(old, new)))
    assert told in str(caught.value)
    assert str(caught.value).startswith("small.yaml: ")


def test_a_file_that_is_not_there(place):
    with pytest.raises(ApiqError, match=r"there is no file gone\.yaml"):
        load_sweep("gone.yaml")
