"""Tables as data and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from apiq.reporting.units import known, number

DASH = "\N{EM DASH}"


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str
    error: str = ""
    """Standard error, behind the text."""
    below: str = ""
    """Smaller, under the text."""
    why: str = ""
    """Reason for a dash; becomes a note under the table."""
    swatch: str = ""
    """Colour role of a square before the text, where the table is the key of a figure."""


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first columns are text, the others numbers unless `words` is set."""

    head: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    """Title (may be empty) and rows of each part."""
    words: bool = False
    labels: int = 1
    """How many columns are text."""

    @property
    def notes(self) -> dict[str, int]:
        """The reasons for dashes, numbered in the order in which they occur."""
        cells = (cell for _, rows in self.groups for row in rows for cell in row)
        return {why: place for place, why in enumerate(dict.fromkeys(cell.why for cell in cells if cell.why), 1)}


def cell(value: Any, why: str, written: Callable[[float], str] = number, **more: str) -> Cell:
    """A number as `written`, or a dash with the reason `why` if it is missing or not finite."""
    if known(value):
        return Cell(written(value), **more)
    return Cell(DASH, why="Not a finite number." if isinstance(value, float) else why)


def markdown(table: Table, title: str) -> str:
    """The table as GitHub-flavoured Markdown, with its notes as a list."""
    notes = table.notes
    texts = len(table.head) if table.words else table.labels
    rule = ["---"] * texts + ["---:"] * (len(table.head) - texts)
    lines = [f"# {title}", "", _line(table.head), _line(rule)]
    for name, rows in table.groups:
        if name:
            lines.append(_line([f"**{_plain(name)}**", *[""] * (len(table.head) - 1)]))
        lines += [_line(_marked(entry, notes) for entry in row) for row in rows]
    lines += [""] * bool(notes) + [f"{place}. {_plain(why)}" for why, place in notes.items()]
    return "\n".join(lines) + "\n"


def read_markdown(text: str) -> Table:
    """The table that `markdown` wrote; what stood behind or below a text has become a part of it.

    Raises:
        ValueError: it is no such table.
    """
    notes = {f"[{place}]": _read(why) for place, why in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)}
    rows = [line[2:-2].split(" | ") for line in text.split("\n") if line.startswith("| ")]
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("not all rows are as long as the head")
    groups: list[tuple[str, list[Row]]] = [("", [])]
    for name, *others in rows[2:]:
        if name.startswith("**") and not any(others):
            groups.append((_read(name[2:-2]), []))
        else:
            groups[-1][1].append(tuple(_unmarked(entry, notes) for entry in (name, *others)))
    parts = tuple((name, tuple(each)) for name, each in groups if name or each)
    return Table(tuple(map(_read, rows[0])), parts, labels=rows[1].count("---"))


def _line(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _marked(entry: Cell, notes: Mapping[str, int]) -> str:
    error, below = (f" ± {entry.error}" if entry.error else ""), (f" ({_plain(entry.below)})" if entry.below else "")
    text = f"{_plain(entry.text)}{error}{below}"
    return f"{text} [{notes[entry.why]}]" if entry.why else text


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _unmarked(entry: str, notes: Mapping[str, str]) -> Cell:
    text, _, mark = entry.rpartition(" ")
    return Cell(_read(text), why=notes[mark]) if mark in notes else Cell(_read(entry))


def _read(text: str) -> str:
    return text.replace("\\|", "|").replace("&lt;", "<")
