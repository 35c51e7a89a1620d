"""The table, the figure and cells.json of a sweep, from what its cells measured."""

import csv
import json

import pytest

from apiq.errors import ApiqError
from apiq.sweeps import results
from apiq.sweeps.cells import plan
from apiq.sweeps.outcome import Outcome

LISTED = """
title: Small
grid: {quantize.bits: [3, 2], quantize.method: [qlora, loftq]}
table:
  rows: [quantize.bits, quantize.method]
  metrics:
    perplexity: quantized.perplexity.*
    time: {metric: timing.quantize.seconds, written: duration}
paper: {columns: [Llama], full: [5.47], rows: [[2, loftq, 1.0e+3]]}
"""


def done(perplexity, bits=2.5, **more):
    metrics = {"full.perplexity.demo": 8.0, "quantized.perplexity.demo": perplexity, "effective_bits": bits}
    return Outcome("done", None, {**metrics, "timing.quantize.seconds": 65.0, **more})


@pytest.fixture
def outcomes(write):
    """Plan a sweep file and give its cells these outcomes, in order."""

    def outcomes(text, *found):
        planned = plan(write(text))
        return planned, {cell.name: outcome for cell, outcome in zip(planned.cells, found, strict=True)}

    return outcomes


def lines(path):
    rows = (line.removeprefix("|").removesuffix("|").split("|") for line in path.read_text().splitlines())
    return [[entry.strip() for entry in row] for row in rows]


def test_a_row_for_each_cell_with_bits_and_the_paper_beside(outcomes, tmp_path):
    failed = Outcome("failed", "there is no sun.")
    results.write(tmp_path, *outcomes(LISTED, done(9.0), done(8.5, 3.0), failed, done(12.345678)))
    rows = lines(tmp_path / "table.md")
    assert rows[2] == ["bits", "method", "perplexity", "time", "bits per weight", "paper: Llama"]
    assert rows[4] == ["full precision", "", "8.000", "", "", "5.47"]
    assert rows[6] == ["3", "loftq", "8.500", "1 min 05 s", "3.00", ""]
    assert rows[7][:3] == ["2", "qlora", "\N{EM DASH} [1]"]
    assert rows[8] == ["2", "loftq", "12.35", "1 min 05 s", "2.50", "1,000"]
    assert "1. failed: there is no sun." in (tmp_path / "table.md").read_text()


def test_two_texts_are_two_columns(outcomes, tmp_path):
    both = done(9.0, **{"quantized.perplexity.c4": 11.0})
    results.write(tmp_path, *outcomes(LISTED, both, both, both, done(8.0)))
    rows = lines(tmp_path / "table.md")
    assert rows[2][2:4] == ["perplexity demo", "perplexity c4"]
    assert rows[8][2:4] == ["8.000", "\N{EM DASH} [1]"]


def test_choices_across_have_their_bits_below_and_the_paper_in_a_part_of_its_own(outcomes, tmp_path, write, place):
    text = (place / write()).read_text()
    smaller = {"quantized.effective_bits": 4.25, "refined.effective_bits": 3.5}  # its adapters in few bits
    results.write(tmp_path, *outcomes(text, done(9.0), done(8.5), done(12.0), done(10.0, 4.25, **smaller)))
    rows = lines(tmp_path / "table.md")
    assert rows[0] == ["# Small (Table 0 of the paper)"]
    assert rows[2] == ["method", "bits 3", "bits 2"]
    assert rows[6] == ["bw", "8.500 (2.50)", "10.00 (4.25)"]
    assert rows[-2:] == [["rtn", "", "431.97"], ["bw", "", "7.59"]]
    refined = done(10.0, 4.25, **smaller, **{"refined.perplexity.demo": 9.0})
    of_refined = text.replace("quantized.perplexity", "refined.perplexity")
    results.write(tmp_path, *outcomes(of_refined, refined, refined, refined, refined))
    assert "| bw | 9.000 (3.50) | 9.000 (3.50) |" in (tmp_path / "table.md").read_text()


def test_the_csv_has_every_metric_and_number(outcomes, tmp_path):
    results.write(tmp_path, *outcomes(LISTED, done(9.0), done(8.5), Outcome("refused", "why"), done(12.345678)))
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert rows[3]["quantized.perplexity.demo"] == "12.345678"
    assert rows[3]["paper: Llama"] == "1000.0"
    assert (rows[2]["status"], rows[2]["error"], rows[2]["effective_bits"]) == ("refused", "why", "")


def test_cells_json_tells_all_of_it(outcomes, tmp_path):
    kept = Outcome("done", None, done(9.0).metrics, ("errors.csv",))
    planned, found = outcomes(LISTED, kept, done(8.5), Outcome("failed", "no"), done(12.0))
    results.write(tmp_path, planned, found)
    told = json.loads((tmp_path / "cells.json").read_text())
    assert told["keys"] == told["axes"] == ["quantize.bits", "quantize.method"]
    assert told["metric"] == "quantized.perplexity.demo"
    assert told["paper"] == [
        {"quantize.bits": "2", "quantize.method": "loftq", "column": "Llama", "value": 1000.0}
    ]  # fmt: skip
    first = told["cells"][0]
    assert first["changes"] == {"quantize.bits": 3, "quantize.method": "qlora"}
    assert first["errors"] == f"cells/{planned.cells[0].name}/errors.csv"
    assert [(cell["status"], cell["error"]) for cell in told["cells"][1:3]] == [("done", None), ("failed", "no")]


FIGURE = "figure: {kind: %s, x: %s, y: %s, series: %s, log_y: true}\n"


@pytest.mark.parametrize(
    ("kind", "x", "series"),
    [
        ("line", "quantize.bits", "quantize.method"),
        ("bar", "quantize.method", "quantize.bits"),
        ("scatter", "effective_bits", "quantize.method"),
    ],
)
def test_each_kind_of_figure_shows_what_was_measured(outcomes, tmp_path, kind, x, series):
    text = LISTED + FIGURE % (kind, x, "quantized.perplexity.*", series)
    results.write(tmp_path, *outcomes(text, done(9.0), done(8.5), Outcome("failed", "no"), done(12.0)))
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(name in drawn for name in ("qlora", "loftq", "perplexity"))
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_figure_of_errors_has_a_mark_for_each_linear_of_the_quantized_model(outcomes, tmp_path):
    from apiq.sweeps.figure import marks

    spec = "figure: {kind: line, data: errors, x: block, y: [with, without], series: quantize.bits, panels: linear}\n"
    planned, found = outcomes(LISTED + spec, done(9.0), *[Outcome("failed", "no")] * 3)
    folder = tmp_path / "cells" / planned.cells[0].name
    folder.mkdir(parents=True)
    rows = ["model,block,linear,with,without", "rtn,0,q,9,9", "quantized,0,q,1.5,2", "quantized,1,q,,2"]
    (folder / "errors.csv").write_text("\n".join(rows))
    cells = [(cell, found[cell.name]) for cell in planned.cells]
    drawn = [(mark.panel, mark.series, mark.x, mark.y) for mark in marks(planned.sweep, cells, tmp_path)]
    assert drawn == [("q", "bits 3", 0.0, 1.5), ("q", "bits 3", 1.0, 2.0)]
    (folder / "errors.csv").write_text("model,block,linear\nquantized,0,q")
    with pytest.raises(ApiqError, match=r"errors\.csv has no column with; it has model, block, linear"):
        marks(planned.sweep, cells, tmp_path)


def test_a_figure_of_what_no_cell_measured_is_refused(outcomes, tmp_path):
    text = LISTED + FIGURE % ("line", "quantize.bits", "accuracy", "quantize.method")
    with pytest.raises(ApiqError, match=r"no cell of it has quantize\.bits and accuracy; see cells\.json"):
        results.write(tmp_path, *outcomes(text, *[done(9.0)] * 4))
    assert (tmp_path / "table.md").exists()
