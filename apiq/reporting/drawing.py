"""How every figure looks, and how it becomes SVG and PNG with the same bytes each time."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from apiq.files import write_text
from apiq.reporting.palette import colour, themed

P = ParamSpec("P")
T = TypeVar("T")

WIDE, NARROW = 7.6, 3.6
"""Widths in inches: a column of text on a screen or on paper, and a phone. Every figure is drawn for each."""

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
BACKGROUND = f'<rect width="100%" height="100%" fill="{colour("paper")}"/>'
"""Stands behind a figure in a file of its own; in the page there is one already."""
FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
STYLE: dict[RcKeyType, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": colour("muted"),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": colour("muted"),
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": colour("ink"),
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": colour("rule"),
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "apiq",
    "text.color": colour("ink"),
    "text.parse_math": False,
    "xtick.color": colour("muted"),
    "xtick.labelsize": 8,
    "xtick.major.size": 3,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.color": colour("muted"),
    "ytick.labelsize": 8,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """This module's style, whatever the caller's matplotlib is set to; put back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run `draw` in the style of this module."""

    @functools.wraps(draw)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        with _style():
            return draw(*args, **kwargs)

    return within


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` x `height` inches with its panels in reading order."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(grid.flat)


def write(axes: Axes, text: str, at: tuple[float, float], role: str = "ink", **options: Any) -> None:
    """A label next to the point `at` of the data, `offset` points away from it."""
    options = {"offset": (0, 0), "ha": "left", "va": "center", "color": colour(role), "fontsize": 8} | options
    axes.annotate(text, at, xytext=options.pop("offset"), textcoords="offset points", annotation_clip=False, **options)


def key(figure: Figure, axes: Axes, columns: int) -> None:
    """What the marks of `axes` stand for, in rows of `columns` above the panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.6,
        borderaxespad=0.2,
    )


def apart(positions: Sequence[float], gap: float, least: float = -math.inf) -> list[float]:
    """`positions`, moved as little as needed to be at least `gap` from each other and none below `least`.

    Neighbours that are too close form a cluster, which is spread evenly about its mean, or from `least` upwards.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    clusters: list[tuple[float, list[int]]] = []
    for index in order:
        centre, members = positions[index], [index]
        while clusters and centre - clusters[-1][0] < gap * (len(members) + len(clusters[-1][1])) / 2:
            below, others = clusters.pop()
            centre = (centre * len(members) + below * len(others)) / (len(members) + len(others))
            members = others + members
        clusters.append((centre, members))
    moved = [0.0] * len(positions)
    for centre, members in clusters:
        for place, index in enumerate(members):
            moved[index] = centre + gap * (place - (len(members) - 1) / 2)
    below = least - gap
    for index in order:
        below = moved[index] = max(moved[index], below + gap)
    return moved


def svg(figure: Figure) -> str:
    """The figure as an SVG document without background, dates or names of programs."""
    stream = io.StringIO()
    with _style():
        _laid_out(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", facecolor="none", metadata=nothing)
    return re.sub(r"(font: [^;']*px) 'DejaVu Sans'", rf"\1 {FONTS}", stream.getvalue())


def _laid_out(figure: Figure) -> None:
    """Lay `figure` out once and for all: a PNG of it is then like its SVG, and neither is laid out again."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)


def save(figure: Figure, document: str, path: Path) -> None:
    """Write `document`, the SVG of `figure`, as `path`.svg on white, and the figure as `path`.png."""
    write_text(path.with_suffix(".svg"), re.sub(r"(<svg\b[^>]*>)", rf"\1\n {BACKGROUND}", document, count=1))
    with _style():
        figure.savefig(path.with_suffix(".png"), dpi=160, facecolor=colour("paper"), metadata={"Software": None})


def inline(document: str, name: str, kind: str, description: str) -> str:
    """An SVG document as an element of class `kind` in a page, in its colours, read out as `description`.

    Identifiers start with `name`, so that figures of one page do not refer to each other's parts.
    """
    root = ElementTree.fromstring(document)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    for definitions in root.findall(f"{{{SVG}}}defs"):  # rules of their <style> would hold for the whole page
        for rule in definitions.findall(f"{{{SVG}}}style"):
            definitions.remove(rule)
    root.attrib |= {"class": kind, "role": "img", "aria-label": description}
    targets = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        attributes = element.attrib
        if attributes.get("id") in targets:
            attributes["id"] = f"{name}-{attributes['id']}"
        else:
            attributes.pop("id", None)
        if LINK in attributes:
            attributes["href"] = f"#{name}-{attributes.pop(LINK)[1:]}"
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{name}-")
        if "style" in attributes:
            attributes["style"] = themed(attributes["style"])
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _references(element: ElementTree.Element) -> list[str]:
    found = re.findall(r"url\(#([^)]+)\)", " ".join(element.attrib.values()))
    return [*found, element.attrib[LINK][1:]] if LINK in element.attrib else found
