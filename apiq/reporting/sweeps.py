"""The sweeps that were run: the folders of data/sweeps, as `apiq sweep` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apiq.errors import ApiqError
from apiq.files import read_json
from apiq.reporting.cells import Table, read_markdown

CELLS, TABLE, FIGURE = "cells.json", "table.md", "figure.svg"
DONE = "done"


class SweepCell(BaseModel):
    """One run of the pipeline with some parameters changed."""

    model_config = ConfigDict(frozen=True)

    name: str
    labels: dict[str, str] = Field(default_factory=dict)
    """What tells it from the others, by axis."""
    status: str
    """done, failed or refused."""
    error: str | None = None
    """Why it is not done."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Those of data/metrics.json by dotted key."""
    kept: tuple[str, ...] = ()
    """Files of this cell, below the folder of the sweep."""


class Sweep(BaseModel):
    """A grid of such runs, with the table and the figure that were made of them."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    name: str
    title: str
    source: str | None = None
    """What of the paper it repeats, as in `Table 2`."""
    about: str = ""
    """What it asks."""
    caption: str = ""
    """What is to be seen in its figure."""
    axes: tuple[str, ...] = ()
    """What cells are told apart by, in the order of the file."""
    cells: tuple[SweepCell, ...]

    def title_of(self, cell: SweepCell) -> str:
        """How to call a cell of this sweep: by its labels, or else by its name."""
        return ", ".join(cell.labels[axis] for axis in self.axes if axis in cell.labels) or cell.name

    @property
    def figure(self) -> Path | None:
        """Its figure, if one was drawn."""
        path = self.folder / FIGURE
        return path if path.is_file() else None

    def drawings(self) -> list[tuple[SweepCell, Path]]:
        """The figures that were kept of its cells, those of one kind together."""
        kept = [(cell, self.folder / file) for cell in self.cells for file in cell.kept if file.endswith(".svg")]
        kinds = list(dict.fromkeys(path.name for _, path in kept))
        return sorted(
            ((cell, path) for cell, path in kept if path.is_file()), key=lambda each: kinds.index(each[1].name)
        )

    def table(self) -> Table | None:
        """Its table with the paper's numbers beside ours; None if there is none.

        Raises:
            ApiqError: it is damaged.
        """
        path = self.folder / TABLE
        if not path.is_file():
            return None
        try:
            return read_markdown(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ApiqError(f"{path} is damaged: {error}; run the sweep again.") from None


def read_sweeps(folder: Path) -> tuple[Sweep, ...]:
    """Every sweep that has a folder in `folder`, by name.

    Raises:
        ApiqError: a cells.json is damaged.
    """
    return tuple(_read(path) for path in sorted(folder.glob(f"*/{CELLS}")))


def _read(path: Path) -> Sweep:
    content = read_json(path)
    try:
        return Sweep.model_validate({**content, "folder": path.parent} if isinstance(content, dict) else content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise ApiqError(f"{path} is damaged: {where}: {first['msg']}; run the sweep again.") from None
