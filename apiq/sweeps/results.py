"""What became of the cells of a sweep, and the files that tell it: cells.json, the table, the figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apiq.files import write_json, write_text
from apiq.reporting.cells import markdown
from apiq.sweeps.cells import Cell, Plan
from apiq.sweeps.figure import draw
from apiq.sweeps.file import Sweep, label_of
from apiq.sweeps.outcome import Outcome
from apiq.sweeps.table import matching, paper_numbers, table


def write(folder: str | Path, plan: Plan, outcomes: Mapping[str, Outcome]) -> None:
    """Write cells.json, table.md, table.csv, figure.svg and figure.png of a sweep.

    Args:
        folder: of this sweep; the folders of its cells are in `folder`/cells.
        plan: what was to be run.
        outcomes: by the name of the cell.

    Raises:
        ApiqError: the figure asks for what no cell measured.
    """
    folder = Path(folder)
    cells = [(cell, outcomes[cell.name]) for cell in plan.cells]
    write_json(folder / "cells.json", _content(plan, cells))
    write_text(folder / "table.md", markdown(table(plan.sweep, cells), _heading(plan.sweep)))
    write_text(folder / "table.csv", _csv(plan.sweep, cells))
    if plan.sweep.figure is not None and any(outcome.status == "done" for _, outcome in cells):
        draw(plan.sweep, cells, folder)


def _heading(sweep: Sweep) -> str:
    return f"{sweep.title} ({sweep.source} of the paper)" if sweep.source else sweep.title


def _content(plan: Plan, cells: Sequence[tuple[Cell, Outcome]]) -> dict[str, Any]:
    sweep = plan.sweep
    metrics = [column.metric for column in sweep.table.metrics.values()]
    return {
        "name": plan.name,
        "title": sweep.title,
        "source": sweep.source,
        "about": sweep.about,
        "caption": sweep.figure.caption if sweep.figure else "",
        "axes": sweep.axes,
        "keys": list(dict.fromkeys(key for cell, _ in cells for key in cell.changes)),
        "metric": next((name for _, outcome in cells for name in matching(outcome.metrics, metrics[0])), metrics[0]),
        "paper": _paper(sweep),
        "cells": [
            {
                "name": cell.name,
                "labels": dict(cell.labels),
                "changes": dict(cell.changes),
                "status": outcome.status,
                "error": outcome.error,
                "metrics": dict(outcome.metrics),
                "kept": [f"cells/{cell.name}/{file}" for file in outcome.kept],
                "errors": next((f"cells/{cell.name}/{file}" for file in outcome.kept if file == "errors.csv"), None),
            }
            for cell, outcome in cells
        ],
    }


def _paper(sweep: Sweep) -> list[dict[str, Any]]:
    if sweep.paper is None:
        return []
    return [
        {**dict(zip(sweep.axes, map(label_of, row), strict=False)), "column": column, "value": value}
        for row in sweep.paper.rows
        for column, value in zip(sweep.paper.columns, row[len(sweep.axes) :], strict=True)
    ]


def _csv(sweep: Sweep, cells: Sequence[tuple[Cell, Outcome]]) -> str:
    """A row a cell: labels, status, each metric that some cell has, the numbers of the paper."""
    metrics = list(dict.fromkeys(name for _, outcome in cells for name in outcome.metrics))
    numbers, columns = paper_numbers(sweep), sweep.paper.columns if sweep.paper else []
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*sweep.axes, "status", "error", *metrics, *(f"paper: {column}" for column in columns)])
    for cell, outcome in cells:
        beside = numbers.get(tuple(cell.labels.values()), [None] * len(columns))
        values = [outcome.metrics.get(name) for name in metrics]
        rows.writerow([*cell.labels.values(), outcome.status, outcome.error, *values, *beside])
    return text.getvalue()
