"""The figure of a sweep: its marks as data, and how they are drawn."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apiq.errors import ApiqError
from apiq.reporting.drawing import NARROW, WIDE, key, panels, save, styled, svg, write
from apiq.reporting.palette import colour, ramp
from apiq.reporting.units import known
from apiq.sweeps.file import FigureSpec, Sweep
from apiq.sweeps.outcome import Outcome
from apiq.sweeps.table import Cells, matching, short

MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Mark:
    """A point, or the end of a bar."""

    panel: str
    series: str
    x: str | float
    y: float
    name: str
    """What a reader may want to know it by."""


def draw(sweep: Sweep, cells: Cells, folder: Path) -> None:
    """Write figure.svg and figure.png to the folder of the sweep, where those of its cells are.

    Raises:
        ApiqError: no cell has what the figure shows.
    """
    assert sweep.figure is not None
    found = marks(sweep, cells, folder)
    if not found:
        what = f"{sweep.figure.x} and {' or '.join(sweep.figure.y)}"
        raise ApiqError(f"the figure of {folder.name} cannot be drawn: no cell of it has {what}; see cells.json.")
    drawn = picture(sweep.figure, found, WIDE)
    save(drawn, svg(drawn), folder / "figure")


def marks(sweep: Sweep, cells: Cells, folder: Path) -> list[Mark]:
    """What is drawn, in the order of the cells; what was not measured is left out.

    Raises:
        ApiqError: errors.csv of a cell has no such column.
    """
    spec, found = sweep.figure, []
    assert spec is not None
    for cell, outcome in cells:
        name = ", ".join(cell.labels[axis] for axis in sweep.axes if axis not in spec.series)
        for values in _values(spec, cell.labels, outcome, folder / "cells" / cell.name):
            x, y = values.get(spec.x), next((values[each] for each in spec.y if known(values.get(each))), None)
            if x is not None and y is not None:
                series = ", ".join(str(values[axis]) for axis in spec.series)
                found.append(Mark(str(values[spec.panels]) if spec.panels else "", series, x, y, name))
    numeric = all(_number(mark.x) is not None for mark in found)
    return [Mark(m.panel, m.series, float(m.x), m.y, m.name) for m in found] if numeric else found


def _values(spec: FigureSpec, labels: Mapping[str, str], outcome: Outcome, folder: Path) -> Iterator[dict[str, Any]]:
    """Labels and measurements by name: of the cell, or of each row of its errors."""
    if outcome.status != "done":
        return
    if spec.data == "cells":
        named = {pattern: name for pattern in (spec.x, *spec.y) for name in matching(outcome.metrics, pattern)[:1]}
        yield {**labels, **{pattern: outcome.metrics[name] for pattern, name in named.items()}}
        return
    path = folder / "errors.csv"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if unknown := {spec.x, *spec.y} - row.keys() - labels.keys():
                raise ApiqError(f"{path} has no column {sorted(unknown)[0]}; it has {', '.join(row)}.")
            if row.get("model") == "quantized":
                numbers = {column: _number(value) for column, value in row.items()}
                yield {**row, **{column: value for column, value in numbers.items() if value is not None}, **labels}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


@styled
def picture(spec: FigureSpec, found: Sequence[Mark], width: float) -> Figure:
    """The marks in one panel for each of their panels, a colour for each series."""
    names = list(dict.fromkeys(mark.panel for mark in found))
    series = list(dict.fromkeys(mark.series for mark in found))
    columns = min(len(names), 2 if width <= NARROW else 4)
    rows = -(-len(names) // columns)
    figure, axes = panels(width, 0.7 + (3.0 if len(names) == 1 else 1.9) * rows, rows, columns, sharex=True)
    for panel, name in zip(axes, names, strict=False):
        _fill(panel, spec, [mark for mark in found if mark.panel == name], series)
        panel.set_title(name)
        if spec.log_y:
            panel.set_yscale("log")
        if spec.log_x:
            panel.set_xscale("log")
    for panel in axes[len(names) :]:
        panel.set_axis_off()
    figure.supxlabel(short(spec.x), fontsize=8.5, color=colour("muted"))
    figure.supylabel(_last(spec.y[0]), fontsize=8.5, color=colour("muted"))
    if series != [""]:
        key(figure, axes[0], columns=3 if width <= NARROW else 5)
    return figure


def _fill(axes: Axes, spec: FigureSpec, found: Sequence[Mark], series: Sequence[str]) -> None:
    ticks = list(dict.fromkeys(mark.x for mark in found))
    named = spec.kind == "bar" or not all(isinstance(x, float) for x in ticks)
    if named:
        axes.set_xticks(range(len(ticks)), [f"{x:g}" if isinstance(x, float) else str(x) for x in ticks])
    for place, name in enumerate(series):
        points = [(float(ticks.index(m.x) if named else m.x), m.y, m.name) for m in found if m.series == name]
        style: dict[str, Any] = {"color": ramp(place, len(series)), "label": name}
        if spec.kind == "bar":
            share = 0.8 / len(series)
            middles = [x + share * (place - (len(series) - 1) / 2) for x, _, _ in points]
            axes.bar(middles, [y for _, y, _ in points], share, **style)
            continue
        points = sorted(points, key=lambda point: point[0]) if spec.kind == "line" else points
        line = "-" if spec.kind == "line" else ""
        marker = MARKERS[place % len(MARKERS)]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], linestyle=line, marker=marker, ms=4.5, **style)
        for x, y, name_of_point in points if spec.kind == "scatter" else ():
            write(axes, name_of_point, (x, y), offset=(5, 0), fontsize=6.5)


def _last(metric: str) -> str:
    """The name of a metric without what stands for any text."""
    return metric.removesuffix(".*").rpartition(".")[2].replace("_", " ")
