"""The part of the page that shows sweeps."""

import json
import re

import pytest
from matplotlib.figure import Figure

from apiq.errors import ApiqError
from apiq.reporting import drawing
from apiq.reporting.cells import Cell, Table, markdown
from apiq.reporting.comparisons import pareto_section, sweep_section
from apiq.reporting.gather import Folders, Run
from apiq.reporting.page import report
from apiq.reporting.sweeps import read_sweeps
from tests.reporting.made import cell, sweep

ROWS = (
    (Cell("loftq"), Cell("14.78"), Cell("1,000")),
    (Cell("qlora"), Cell("—", why="failed: no sun"), Cell("180,000")),
)
EVALUATION = {
    "full": {"perplexity": {"wiki": 7.3891, "demo": 2.0}},
    "quantized": {"perplexity": {"wiki": 20.086, "demo": 8.0}},
    "finetuned": {"perplexity": {"wiki": 12.182, "demo": 4.0}},
}
TABLE = Table(("method", "perplexity", "paper: Llama-2-7B"), (("", ROWS),))
CELLS = [
    cell("loftq", 8, (14.7782, 4.0), 3.5),
    cell("qlora", 8, status="failed", error="no\nsun"),
    cell("oft", 8, status="refused", error="oft has no rank."),
]


def draw(folder, label="perplexity by rank"):
    figure = Figure(figsize=(4, 2))
    axes = figure.subplots()
    axes.plot([4, 8], [1, 2], color="#bf4b00")
    axes.set_title(label)
    drawing.save(figure, drawing.svg(figure), folder / "figure")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with a sweep on it, and its folder."""
    place = tmp_path_factory.mktemp("run")
    draw(sweep(place / "sweeps", CELLS, markdown(TABLE, "Title")))
    (place / "evaluation").mkdir()
    (place / "evaluation/metrics.json").write_text(json.dumps(EVALUATION))
    out = report(place, place / "report").parent
    return (out / "report.html").read_text(), out


def section(place):
    (found,) = read_sweeps(place)
    return sweep_section(found)


def test_a_sweep_is_shown_with_its_figure_its_table_and_its_failures(whole):
    text, out = whole
    assert "The sweep ranks, after Figure 6 of the paper: 1 of 3 cells are done." in text
    assert "The cell qlora, 8 failed: no sun" in text
    assert "The cell oft, 8 was refused: oft has no rank." in text
    assert re.search(r"<td>14\.78</td>\s*<td>1,000</td>", text)
    assert 'aria-label="Rank &amp; &lt;method&gt;."' in text
    assert "perplexity by rank" in text
    assert {"sweep-ranks.svg", "sweep-ranks.png"} <= {path.name for path in (out / "figures").iterdir()}
    assert (out / "tables/sweep-ranks.md").read_text().endswith("1. failed: no sun\n")


def test_the_page_closes_with_loss_against_bits(whole):
    text, out = whole
    closing = text[text.rindex("<h2>") :]
    assert closing.startswith("<h2>Loss against bits")
    assert "Rank &amp; &lt;method&gt;: loftq, 8" in closing
    assert "No sweep has been run" not in closing
    assert (out / "figures/pareto.svg").is_file()


def test_its_figure_is_in_the_colours_of_the_page_and_has_no_background(whole):
    text, out = whole
    start = text.index('id="figure-sweep-ranks"')
    drawn = text[start : text.index("</figure>", start)]
    assert "var(--quantized)" in drawn
    assert "#bf4b00" not in drawn
    assert drawing.BACKGROUND not in drawn
    assert drawing.BACKGROUND in (out / "figures/sweep-ranks.svg").read_text()


def test_a_sweep_without_figure_is_shown_by_its_table(tmp_path):
    sweep(tmp_path, CELLS, markdown(TABLE, "Title"))
    shown = section(tmp_path)
    assert shown.drawings == []
    assert shown.listings[0].table == TABLE


def test_figures_kept_of_cells_are_shown_kind_by_kind(tmp_path):
    cells = [cell(name, 8, (9.0, 4.0), 3.5) for name in ("loftq", "apiq-lw")]
    for each in cells:
        each["kept"] = [f"cells/{each['name']}/{file}" for file in ("weights.svg", "errors.csv", "lost.svg", "a_b.svg")]
    place = sweep(tmp_path / "sweeps", cells, markdown(TABLE, "Title"))
    for each in cells:
        folder = place / "cells" / each["name"]
        folder.mkdir(parents=True)
        for file in ("weights", "a_b"):
            draw(folder, f"{file} of {each['name']}")
            (folder / "figure.svg").rename(folder / f"{file}.svg")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/metrics.json").write_text(json.dumps(EVALUATION))
    out = report(tmp_path, tmp_path / "report").parent
    captions = re.findall(r"<figcaption>(.* of .*)</figcaption>", (out / "report.html").read_text())
    wanted = ["Weights of loftq, 8.", "Weights of apiq-lw, 8.", "A b of loftq, 8.", "A b of apiq-lw, 8."]
    assert [caption for caption in captions if caption in wanted] == wanted
    assert "a_b of ranks-apiq-lw-8" in (out / "figures/sweep-ranks-ranks-apiq-lw-8-a_b.svg").read_text()


def test_a_sweep_without_table_says_so(tmp_path):
    draw(sweep(tmp_path, CELLS))
    shown = section(tmp_path)
    assert shown.absent[-1] == "The sweep has no table.md: run it again."
    assert (len(shown.drawings), shown.listings) == (1, [])


def test_without_sweeps_the_points_are_those_of_this_run(tmp_path):
    (tmp_path / "README.md").write_text("Sweeps")
    assert read_sweeps(tmp_path) == read_sweeps(tmp_path / "missing") == ()
    shown = pareto_section(Run(Folders(), quantization={"effective_bits": 3.0}, evaluation=EVALUATION))
    assert shown.absent == ["No sweep has been run: the points are those of this run alone."]
    rows = [row for _, rows in shown.listings[0].table.groups for row in rows]
    assert [row[0].text for row in rows] == ["1 · this run", "2 · this run"]  # quantized and finetuned


def test_without_any_measurement_the_reason_is_told():
    shown = pareto_section(Run(Folders(), absent={"evaluation": "It has not been run."}))
    assert (shown.drawings, shown.absent) == ((), ["It has not been run."])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("cells.json", '{"name": "a", "title": "b"}', "cells: Field required"),
        ("cells.json", "[]", "its content: "),
        ("cells.json", "{", "it is not JSON"),
        ("table.md", "| a | b |\n| --- | --- |\n| 1 |", "not all rows are as long as the head; run the sweep again"),
    ],
)
def test_a_damaged_sweep_is_refused_by_its_file(tmp_path, file, content, said):
    folder = sweep(tmp_path, CELLS, markdown(TABLE, "Title"))
    (folder / file).write_text(content)
    with pytest.raises(ApiqError, match=rf"{re.escape(str(folder / file))} is damaged: .*{re.escape(said)}"):
        section(tmp_path)


def test_a_damaged_figure_is_refused(tmp_path):
    (sweep(tmp_path, CELLS) / "figure.svg").write_text("<svg")
    (tmp_path / "metrics.json").write_text('{"full": {}}')
    with pytest.raises(ApiqError, match=r"figure.svg is damaged: it is not SVG; run the sweep again"):
        report(Folders(evaluation=tmp_path, sweeps=tmp_path), tmp_path / "report")


def test_a_cell_without_labels_goes_by_its_name(tmp_path):
    sweep(tmp_path, [{"name": "plain", "status": "done"}])
    (found,) = read_sweeps(tmp_path)
    assert found.title_of(found.cells[0]) == "plain"


@pytest.mark.parametrize(
    ("table", "heading"),
    [
        (TABLE, "Our numbers and those of the paper"),
        (Table(("method", "3"), (("The paper: Llama-2-7B", ()),)), "Our numbers and those of the paper"),
        (Table(("bits", "method", "perplexity"), (("", ()),), labels=2), "Our numbers"),
    ],
)
def test_the_heading_of_a_table_promises_what_is_in_it(tmp_path, table, heading):
    sweep(tmp_path, CELLS, markdown(table, "Title"))
    (listing,) = section(tmp_path).listings
    assert listing.title == heading


def test_columns_of_text_begin_at_the_left(tmp_path):
    rows = ((Cell("2"), Cell("loftq"), Cell("14.78")),)
    table = Table(("bits", "method", "perplexity"), (("", rows),), labels=2)
    sweep(tmp_path / "sweeps", CELLS, markdown(table, "Title"))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/metrics.json").write_text(json.dumps(EVALUATION))
    text = report(tmp_path, tmp_path / "report").read_text()
    assert '<th scope="col" class="label">method</th>' in text and '<td class="label">loftq<' in text
    assert '<th scope="col">perplexity</th>' in text
