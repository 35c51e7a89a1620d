"""The sweep file: what varies, what all runs share, and what is made of the results.

docs/reference/sweeps.md explains it with an example.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from apiq.errors import ApiqError
from apiq.overrides import read_yaml
from apiq.refusals import require, sentence
from apiq.section import Section
from apiq.sweeps.outcome import RECORD

BESIDE = "-"
"""The label on further axes of a cell that stands beside the grid."""


def label_of(value: Any) -> str:
    """How a value is called in names and tables."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _labels(values: Any) -> Any:
    """One label is a list too."""
    return [label_of(value) for value in (values if isinstance(values, list) else [values])]


def _named(choices: Any) -> Any:
    """Choices whose labels are text, though YAML reads some as numbers."""
    return {label_of(label): changes for label, changes in choices.items()} if isinstance(choices, Mapping) else choices


def _axes(grid: Any) -> Any:
    """A list of values as choices, each labelled by its value."""
    if not isinstance(grid, Mapping):
        return grid
    return {
        axis: {label_of(value): {axis: value} for value in choices} if isinstance(choices, list) else choices
        for axis, choices in grid.items()
    }


def _columns(metrics: Any) -> Any:
    """A metric alone is a column too."""
    if not isinstance(metrics, Mapping):
        return metrics
    return {name: {"metric": each} if isinstance(each, str) else each for name, each in metrics.items()}


Changes = dict[str, Any]
"""Values of params.yaml by their path, as in {quantize.bits: 3}."""
Choices = Annotated[dict[str, Changes], BeforeValidator(_named)]
"""Label -> what that choice changes."""


class Profile(Section):
    """Another model for the same sweep, for those who have it."""

    params: str | None = None
    """Name of a file in params/ that is laid over params.yaml first."""
    base: Changes = Field(default_factory=dict)
    """Changes on top of those of the file."""
    grid: dict[str, Choices] = Field(default_factory=dict)
    """Further changes for choices of the sweep, as the settings of this model at 4 bits, and further choices."""


class Column(Section):
    """A measured quantity in the table."""

    metric: str
    """Its path in data/metrics.json, lost.MODEL.TEXT, or timing.STAGE.KEY (fitting: quantize and refine); a * stands
    for anything, as in quantized.perplexity.*."""
    written: Literal["number", "duration", "memory"] = "number"
    """How it is shown: seconds as a duration, MiB as memory."""
    digits: Annotated[int, Field(ge=1, le=12)] = 4
    """Significant digits of a number."""


class TableSpec(Section):
    """The table to print; it always tells effective bits per weight too."""

    rows: Annotated[list[str], Field(min_length=1)]
    """Axes whose labels name a row."""
    columns: str | None = None
    """Axis whose labels become columns; without one each cell is a row."""
    metrics: Annotated[dict[str, Column], Field(min_length=1), BeforeValidator(_columns)]
    """Heading -> what is in it; a metric alone is enough."""


class FigureSpec(Section):
    """The figure to draw."""

    kind: Literal["line", "bar", "scatter"]
    x: str
    """An axis or a metric; a column of errors.csv when data is errors."""
    y: Annotated[list[str], Field(min_length=1), BeforeValidator(_labels)]
    """A metric, or a column of errors.csv when data is errors; of several the first that is known."""
    series: Annotated[list[str], BeforeValidator(_labels)] = Field(default_factory=list)
    """Axes that a colour stands for."""
    mean_over: str | None = None
    """Axis, as seed, whose cells are one mark: their mean, with a line from the least to the most."""
    panels: str | None = None
    """Axis, or column of errors.csv, with a panel for each of its values."""
    data: Literal["cells", "errors"] = "cells"
    """What a mark is: a cell, or a row of the errors by linear that the evaluation of each cell wrote."""
    y_label: str = ""
    """What the y axis says, where the name of the metric does not say it well."""
    log_x: bool = False
    log_y: bool = False
    caption: str = ""
    """What is to be seen, for readers of the page."""


class Paper(Section):
    """The numbers of the paper, to stand beside ours."""

    columns: Annotated[list[str], Field(min_length=1)]
    """What was measured, on which model."""
    rows: list[list[Any]]
    """A label for each axis of the grid, in its order, then a number or nothing for each column."""
    full: list[float | None] = Field(default_factory=list)
    """The full-precision model, by column."""


TAKEN = (RECORD, "errors.csv")
"""Files that are kept of every cell anyway."""


class Sweep(Section):
    """A sweep file."""

    title: Annotated[str, Field(min_length=1)]
    source: str = ""
    """What of the paper it repeats, as in Table 2."""
    about: str = ""
    """What it asks, and how it differs from the paper."""
    base: Changes = Field(default_factory=dict)
    """Changes to params.yaml that all cells share."""
    grid: Annotated[dict[str, Choices], BeforeValidator(_axes)] = Field(default_factory=dict)
    """Every combination of one choice an axis is a cell. An axis is the path of a parameter with a list of values,
    or a name with a section of choices, each with the changes that it makes."""
    cells: Choices = Field(default_factory=dict)
    """Cells beside the grid, by the label that they carry on its first axis (axis `cell` without a grid)."""
    refused: dict[str, dict[str, Annotated[list[str], BeforeValidator(_labels)]]] = Field(default_factory=dict)
    """Reason -> axis -> labels: cells with one of these labels on each of these axes cannot be run and are shown so."""
    profiles: dict[str, Profile] = Field(default_factory=dict)
    """Other models, by the name that --profile takes."""
    keep: list[str] = Field(default_factory=list)
    """Files below data/ that are kept of each cell beside its numbers."""
    table: TableSpec
    figure: FigureSpec | None = None
    paper: Paper | None = None

    @property
    def axes(self) -> list[str]:
        """What cells are told apart by."""
        return list(self.grid) or ["cell"]

    def labels(self, axis: str) -> list[str]:
        """The choices of an axis, cells beside the grid included."""
        return [*self.grid.get(axis, {}), *(self.cells if axis == self.axes[0] else [BESIDE] * bool(self.cells))]

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        require(bool(self.grid or self.cells), "grid", "empty", "axes with their choices")
        for axis, choices in self.grid.items():
            require(bool(choices), f"grid.{axis}", "empty", "at least one choice")
        count = len(self.paper.columns) if self.paper else 0
        for row in self.paper.rows if self.paper else ():
            shape = f"{len(self.axes)} labels ({', '.join(self.axes)}) and {count} numbers"
            require(len(row) == len(self.axes) + count, "paper.rows", row, shape)
        names = [PurePath(file).name for file in self.keep]
        for file, name in zip(self.keep, names, strict=True):
            alone = names.count(name) == 1 and name not in TAKEN
            require(alone, "keep", file, f"a file whose name is neither {' nor '.join(TAKEN)} nor that of another")
        errors = self.figure is not None and self.figure.data == "errors"
        over = self.figure.mean_over if self.figure else None
        require(not (errors and over), "figure.mean_over", over, "left out where data is errors")
        for place, axis, labels in self._references():
            require(axis in self.axes, place, axis, f"one of {', '.join(self.axes)}, the axes of the grid")
            for label in labels:
                known = self.labels(axis)
                require(label in known, place, label, f"one of {', '.join(known)}, the choices of {axis}")
        return self

    def _references(self) -> Iterator[tuple[str, str, Iterable[str]]]:
        """Where the file speaks of axes and their choices: place, axis, labels."""
        table, figure = self.table, self.figure
        yield from (("table.rows", axis, ()) for axis in table.rows)
        if table.columns:
            yield "table.columns", table.columns, ()
        yield from (("figure.series", axis, ()) for axis in (figure.series if figure else ()))
        if figure and figure.mean_over:
            yield "figure.mean_over", figure.mean_over, ()
        if figure and figure.panels and figure.data == "cells":
            yield "figure.panels", figure.panels, ()
        for reason, where in self.refused.items():
            yield from ((f"refused.{reason}", axis, labels) for axis, labels in where.items())
        for name, profile in self.profiles.items():
            yield from ((f"profiles.{name}.grid", axis, ()) for axis in profile.grid)
        for row in self.paper.rows if self.paper else ():
            yield from (("paper.rows", axis, [label_of(label)]) for axis, label in zip(self.axes, row, strict=False))


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ApiqError: there is no such file, or a key or value in it is wrong; one sentence with file, key, value and fix.
    """
    values = read_yaml(path)
    try:
        return Sweep.model_validate(values)
    except ValidationError as refusal:
        raise ApiqError(f"{path}: {sentence(refusal, Sweep)}") from None
