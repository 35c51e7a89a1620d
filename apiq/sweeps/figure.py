"""The figure of a sweep: its marks as data, and how they are drawn."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from apiq.errors import ApiqError
from apiq.reporting.drawing import NARROW, WIDE, apart, key, panels, save, styled, svg, write
from apiq.reporting.palette import colour, ramp
from apiq.reporting.units import known
from apiq.sweeps.file import FigureSpec, Sweep
from apiq.sweeps.outcome import Outcome
from apiq.sweeps.table import Cells, matching, short

MARKERS = "osD^vPX*<>"
LETTER, LINE = 4, 8
"""Points of 1/72 inch that a letter of a name takes across, with a margin, and a name from the next below."""


@dataclass(frozen=True)
class Mark:
    """A point, or the end of a bar."""

    panel: str
    series: str
    x: str | float
    y: float
    name: str
    """What a reader may want to know it by."""
    low: float | None = None
    high: float | None = None
    """The least and the most that `y` is a mean of."""


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
    """What is drawn, in the order of the cells; what was not measured, or has no logarithm to be drawn, is left out.

    Raises:
        ApiqError: errors.csv of a cell has no such column.
    """
    spec, found = sweep.figure, []
    assert spec is not None
    for cell, outcome in cells:
        name = ", ".join(cell.labels[axis] for axis in sweep.axes if axis not in (*spec.series, spec.mean_over))
        for values in _values(spec, cell.labels, outcome, folder / "cells" / cell.name):
            x, y = values.get(spec.x), next((values[each] for each in spec.y if known(values.get(each))), None)
            if x is not None and y is not None and _drawable(spec, x, y):
                series = ", ".join(_called(axis, str(values[axis])) for axis in spec.series)
                found.append(Mark(str(values[spec.panels]) if spec.panels else "", series, x, y, name))
    numeric = all(_number(mark.x) is not None for mark in found)
    if numeric:
        found = [replace(mark, x=float(mark.x)) for mark in found]
    measured = numeric and spec.data == "cells" and spec.x not in sweep.axes
    return _means(found, measured) if spec.mean_over else found


def _drawable(spec: FigureSpec, x: Any, y: float) -> bool:
    """Whether a logarithmic axis has a place for it."""
    number = _number(x)
    return not (spec.log_y and y <= 0) and not (spec.log_x and number is not None and number <= 0)


def _means(found: Sequence[Mark], measured: bool) -> list[Mark]:
    """One mark for all that differ in `y` alone, or in `x` too where that was `measured`."""
    alike: dict[tuple[Any, ...], list[Mark]] = {}
    for mark in found:
        alike.setdefault((mark.panel, mark.series, mark.name, None if measured else mark.x), []).append(mark)
    means = []
    for marks in alike.values():
        heights = [mark.y for mark in marks]
        x = fmean(float(mark.x) for mark in marks) if measured else marks[0].x
        means.append(replace(marks[0], x=x, y=fmean(heights), low=min(heights), high=max(heights)))
    return means


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
    ticks = list(dict.fromkeys(mark.x for mark in found))
    columns = min(len(names), 2 if width <= NARROW else 4)
    rows = -(-len(names) // columns)
    figure, axes = panels(width, 0.7 + (3.0 if len(names) == 1 else 1.9) * rows, rows, columns, sharex=True)
    for panel, name in zip(axes, names, strict=False):
        _fill(panel, spec, [mark for mark in found if mark.panel == name], series, ticks)
        panel.set_title(name)
    for panel in axes[len(names) :]:
        panel.set_axis_off()
    figure.supxlabel(short(spec.x), fontsize=8.5, color=colour("muted"))
    figure.supylabel(spec.y_label or _last(spec.y[0]), fontsize=8.5, color=colour("muted"))
    if series != [""]:
        key(figure, axes[0], columns=3 if width <= NARROW else 5)
    if spec.kind == "scatter":
        for panel in axes:
            panel.margins(y=0.12)  # for the names of the lowest
        figure.draw_without_rendering()
        for panel, name in zip(axes, names, strict=False):
            _name_points(panel, [mark for mark in found if mark.panel == name])
    return figure


def _fill(
    axes: Axes, spec: FigureSpec, found: Sequence[Mark], series: Sequence[str], ticks: Sequence[str | float]
) -> None:
    named = spec.kind == "bar" or not all(isinstance(x, float) for x in ticks)
    for place, name in enumerate(series):
        own = [mark for mark in found if mark.series == name]
        points = [(float(ticks.index(mark.x) if named else mark.x), mark.y) for mark in own]
        style: dict[str, Any] = {"color": ramp(place, len(series)), "label": name}
        if spec.kind == "bar":
            share = 0.8 / len(series)
            middles = [x + share * (place - (len(series) - 1) / 2) for x, _ in points]
            axes.bar(middles, [y for _, y in points], share, **style)
            _ranges(axes, middles, own)
            continue
        _ranges(axes, [x for x, _ in points], own)
        style |= {"linestyle": "-" if spec.kind == "line" else "", "marker": MARKERS[place % len(MARKERS)], "ms": 4.5}
        points = sorted(points) if spec.kind == "line" else points
        axes.plot([x for x, _ in points], [y for _, y in points], **style)
    measured = spec.kind == "scatter" and not named
    if spec.log_y:
        axes.set_yscale("log")
        _plain(axes.yaxis, axes.get_ylim())
    if spec.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        if measured:
            _plain(axes.xaxis, axes.get_xlim())
    if named or (spec.log_x and not measured):
        places = range(len(ticks)) if named else [float(x) for x in ticks]
        axes.set_xticks(places, [f"{x:g}" if isinstance(x, float) else str(x) for x in ticks])


def _ranges(axes: Axes, places: Sequence[float], found: Sequence[Mark]) -> None:
    """Lines from the least to the most that a mark is a mean of."""
    for x, mark in zip(places, found, strict=True):
        if mark.low is not None and mark.high is not None:
            axes.vlines(x, mark.low, mark.high, color=colour("muted"), linewidth=1.0)


def _plain(axis: Axis, ends: tuple[float, float]) -> None:
    """Plain numbers on a logarithmic axis, also where it spans less than a decade."""
    low, high = ends
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _name_points(axes: Axes, found: Sequence[Mark]) -> None:
    """Names beside points, moved up and down until none covers another; a name that moved has a line to its point."""
    spots = [axes.transData.transform((float(mark.x), mark.y)) for mark in found]
    leader = {
        "arrowstyle": "-",
        "color": colour("muted"),
        "linewidth": 0.4,
        "shrinkA": 0,
        "shrinkB": 2,
        "relpos": (0, 0.5),
    }
    for members in _columns([spot[0] for spot in spots], [LETTER * len(mark.name) for mark in found]):
        levels = _above(apart([spots[index][1] for index in members], LINE), axes.bbox.y0 + LINE / 2)
        for index, level in zip(members, levels, strict=True):
            mark, moved = found[index], level - spots[index][1]
            options: dict[str, Any] = {"offset": (5, moved)}
            if abs(moved) > LINE / 2:
                options = {"offset": (9, moved), "arrowprops": leader}
            write(axes, mark.name, (float(mark.x), mark.y), fontsize=6.5, **options)


def _above(levels: Sequence[float], floor: float) -> list[float]:
    """Levels a line apart, pushed up where they are below `floor`."""
    order = sorted(range(len(levels)), key=lambda index: levels[index])
    pushed = {index: max(levels[index], floor + place * LINE) for place, index in enumerate(order)}
    return [pushed[index] for index in range(len(levels))]


def _columns(lefts: Sequence[float], widths: Sequence[float]) -> list[list[int]]:
    """The names that may cover each other: those whose extents across overlap, or are joined by others that do."""
    columns: list[list[int]] = []
    end = 0.0
    for index in sorted(range(len(lefts)), key=lambda index: lefts[index]):
        if not columns or lefts[index] > end:
            columns.append([])
            end = 0.0
        columns[-1].append(index)
        end = max(end, lefts[index] + widths[index])
    return columns


def _called(axis: str, label: str) -> str:
    """A label with the name of its axis where it is a bare number."""
    return f"{short(axis)} {label}" if _number(label) is not None else label


def _last(metric: str) -> str:
    """The name of a metric without what stands for any text."""
    return metric.removesuffix(".*").rpartition(".")[2].replace("_", " ")
