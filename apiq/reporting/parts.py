"""What the page is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from apiq.reporting.cells import Table


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn at any width."""

    name: str
    """Its file name without an ending."""
    caption: str
    draw: Callable[[float], Figure]


@dataclass(frozen=True)
class Picture:
    """A figure that was drawn before, as SVG and, beside it, as PNG."""

    name: str
    """Its file name in the report without an ending."""
    caption: str
    svg: Path


@dataclass(frozen=True)
class Listing:
    """A table with its name."""

    name: str
    """Its file name without an ending."""
    title: str
    table: Table
    folded: bool = False
    """Whether the reader opens it by a click."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    drawings: Sequence[Drawing | Picture] = ()
    listings: Sequence[Listing] = ()
    absent: Sequence[str] = field(default=())
    """Sentences that say what is not here and why."""
