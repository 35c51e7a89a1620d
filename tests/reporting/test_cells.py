import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiq.reporting.cells import Cell, Table, cell, markdown, read_markdown


def test_what_is_missing_or_not_finite_is_a_dash_with_its_reason():
    rows = ((Cell("a"), cell(None, "Not run."), cell(float("nan"), "Not run."), cell(2.5, "Not run.")),)
    table = Table(("", "x", "y", "z"), (("", rows),))
    assert [entry.text for entry in rows[0]] == ["a", "—", "—", "2.500"]
    assert table.notes == {"Not run.": 1, "Not a finite number.": 2}


def test_markdown_has_one_line_a_row_aligned_and_escaped():
    table = Table(
        ("", "value"),
        (("part | one", ((Cell("<b>"), Cell("2.0", error="0.1", below="+1")), (Cell("x"), cell(None, "Not run.")))),),
    )
    assert markdown(table, "Title").splitlines() == [
        "# Title",
        "",
        "|  | value |",
        "| --- | ---: |",
        "| **part \\| one** |  |",
        "| &lt;b> | 2.0 ± 0.1 (+1) |",
        "| x | — [1] |",
        "",
        "1. Not run.",
    ]


WORDS = st.text(st.characters(exclude_characters="[]*&", exclude_categories=["Cc", "Cs"]), max_size=8)


@given(st.data())
def test_a_table_written_as_markdown_is_read_back(data):
    width = data.draw(st.integers(1, 4))
    reasons = st.sampled_from(["", "Not run.", "1 < 2 | 3"])
    row = st.tuples(WORDS, *[st.tuples(WORDS, reasons)] * (width - 1))
    groups = data.draw(st.lists(st.tuples(WORDS.filter(bool), st.lists(row, max_size=3)), max_size=3))
    table = Table(
        tuple(data.draw(st.lists(WORDS, min_size=width, max_size=width))),
        tuple(
            (name, tuple((Cell(first), *(Cell(text, why=why) for text, why in others)) for first, *others in rows))
            for name, rows in groups
        ),
        labels=data.draw(st.integers(1, width)),
    )
    assert read_markdown(markdown(table, "Title")) == table


def test_what_stood_behind_and_below_is_read_as_text():
    table = Table(("", "value"), (("", ((Cell("x"), Cell("2.0", error="0.1", below="+1")),)),))
    assert read_markdown(markdown(table, "Title")).groups[0][1][0][1] == Cell("2.0 ± 0.1 (+1)")


@pytest.mark.parametrize("text", ["", "words", "| a | b |\n| --- | ---: |\n| 1 |\n"])
def test_what_is_no_table_is_refused(text):
    with pytest.raises(ValueError, match="not all rows are as long as the head"):
        read_markdown(text)
