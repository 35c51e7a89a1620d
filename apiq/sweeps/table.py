"""The table of a sweep: our numbers, their effective bits, and those of the paper beside them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from apiq.reporting.cells import Cell as Entry
from apiq.reporting.cells import Row, Table
from apiq.reporting.cells import cell as entry_of
from apiq.reporting.units import duration, memory, number
from apiq.sweeps.cells import Cell
from apiq.sweeps.file import Column, Sweep, label_of
from apiq.sweeps.outcome import Outcome

BITS = "effective_bits"
FULL = "full precision"
WRITTEN = {"duration": duration, "memory": memory}

Cells = Sequence[tuple[Cell, Outcome]]


def table(sweep: Sweep, cells: Cells) -> Table:
    """Each cell a row; with `table.columns` a column for each choice of that axis, and a part for each metric."""
    columns = _columns(sweep, cells)
    return _crossed(sweep, cells, columns) if sweep.table.columns else _listed(sweep, cells, columns)


def matching(metrics: Iterable[str], pattern: str) -> list[str]:
    """The names of metrics that a pattern fits."""
    return [name for name in metrics if fnmatch.fnmatchcase(name, pattern)]


def paper_numbers(sweep: Sweep) -> dict[tuple[str, ...], list[float | None]]:
    """The paper's numbers by the labels of a cell."""
    count = len(sweep.axes)
    rows = sweep.paper.rows if sweep.paper else []
    return {tuple(map(label_of, row[:count])): row[count:] for row in rows}


def _columns(sweep: Sweep, cells: Cells) -> dict[str, Column]:
    """Heading -> metric, with a column for each metric that a pattern fits."""
    known = list(dict.fromkeys(name for _, outcome in cells for name in outcome.metrics))
    columns = {}
    for heading, column in sweep.table.metrics.items():
        names = matching(known, column.metric) or [column.metric]
        for name in names:
            of_several = f"{heading} {name.rpartition('.')[2]}" if len(names) > 1 else heading
            columns[of_several] = column.model_copy(update={"metric": name})
    return columns


def _listed(sweep: Sweep, cells: Cells, columns: dict[str, Column]) -> Table:
    numbers, beside = paper_numbers(sweep), sweep.paper.columns if sweep.paper else []
    rows = [
        (
            *(Entry(cell.labels[axis]) for axis in sweep.table.rows),
            *(_entry(outcome, column) for column in columns.values()),
            _bits(outcome),
            *_paper(numbers.get(tuple(cell.labels.values())), len(beside)),
        )
        for cell, outcome in cells
    ]
    head = [*map(short, sweep.table.rows), *columns, "bits per weight", *(f"paper: {name}" for name in beside)]
    return Table(tuple(head), (("", (*_full(sweep, cells, columns), *rows)),), labels=len(sweep.table.rows))


def _crossed(sweep: Sweep, cells: Cells, columns: dict[str, Column]) -> Table:
    across = sweep.table.columns or ""
    labels = list(dict.fromkeys(cell.labels[across] for cell, _ in cells))
    found: dict[tuple[str, ...], dict[str, tuple[Cell, Outcome]]] = {}
    for cell, outcome in cells:
        found.setdefault(tuple(cell.labels[axis] for axis in sweep.table.rows), {})[cell.labels[across]] = cell, outcome
    parts = []
    for heading, column in columns.items():
        rows = tuple(
            (*map(Entry, names), *(_below(of_row.get(label), column) for label in labels))
            for names, of_row in found.items()
        )
        parts.append((f"{heading} (below it, bits per weight)", rows))
    numbers = paper_numbers(sweep)
    for place, name in enumerate(sweep.paper.columns if sweep.paper else ()):
        rows = tuple(
            (*map(Entry, names), *(_number(numbers, of_row.get(label), place) for label in labels))
            for names, of_row in found.items()
        )
        parts.append((f"The paper: {name}", rows))
    head = (*map(short, sweep.table.rows), *(f"{short(across)} {label}" for label in labels))
    return Table(head, tuple(parts), labels=len(sweep.table.rows))


def _full(sweep: Sweep, cells: Cells, columns: dict[str, Column]) -> list[Row]:
    """A row for the full-precision model, where it was measured on what the columns show."""
    names = ["full." + column.metric.removeprefix("quantized.") for column in columns.values()]
    metrics = next((outcome.metrics for _, outcome in cells if any(name in outcome.metrics for name in names)), None)
    if metrics is None:
        return []
    ours = [
        _written(metrics[name], column) if name in metrics else Entry("")
        for name, column in zip(names, columns.values(), strict=True)
    ]
    beside = sweep.paper.columns if sweep.paper else []
    paper = _paper(sweep.paper.full or None if sweep.paper else None, len(beside))
    return [(Entry(FULL), *[Entry("")] * (len(sweep.table.rows) - 1), *ours, Entry(""), *paper)]


def _entry(outcome: Outcome, column: Column) -> Entry:
    if outcome.status != "done":
        return entry_of(None, f"{outcome.status}: {outcome.error}")
    return _written(outcome.metrics.get(column.metric), column)


def _written(value: float | None, column: Column) -> Entry:
    written = WRITTEN.get(column.written, lambda value: number(float(value), column.digits))
    return entry_of(value, f"There is no metric {column.metric}.", written)


def _below(found: tuple[Cell, Outcome] | None, column: Column) -> Entry:
    """A number with its bits below it, those of the model that it is about; nothing where there is no such cell."""
    if found is None:
        return Entry("")
    outcome = found[1]
    own = (outcome.metrics.get(f"{part}.{BITS}") for part in column.metric.split("."))
    entry = _entry(outcome, column)
    bits = next((each for each in own if each), outcome.metrics.get(BITS))
    return Entry(entry.text, below=number(bits, 3) if bits else "", why=entry.why)


def _bits(outcome: Outcome) -> Entry:
    return entry_of(
        outcome.metrics.get(BITS), outcome.error or "The bits were not counted.", lambda bits: number(bits, 3)
    )


def _paper(numbers: Sequence[float | None] | None, count: int) -> list[Entry]:
    return [Entry("" if value is None else f"{value:,g}") for value in numbers or [None] * count]


def _number(
    numbers: dict[tuple[str, ...], list[float | None]], found: tuple[Cell, Outcome] | None, place: int
) -> Entry:
    values = numbers.get(tuple(found[0].labels.values())) if found else None
    return _paper([values[place]] if values else None, 1)[0]


def short(axis: str) -> str:
    """The heading of an axis: the last part of the path of a parameter."""
    return axis.rpartition(".")[2].replace("_", " ")
