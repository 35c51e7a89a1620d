from apiq.reporting.cells import Cell, Table, cell, markdown


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
