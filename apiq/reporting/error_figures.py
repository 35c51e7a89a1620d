"""The errors of weights and activations by block, one panel or line for each kind of linear (Figures 3, 4, A.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apiq.reporting.drawing import NARROW, apart, key, panels, styled, write
from apiq.reporting.error_lines import Line
from apiq.reporting.figures import plain, role
from apiq.reporting.palette import colour, ramp
from apiq.reporting.units import short_names

WIDEST = 20
"""Times that the peak of a line may be as high as that of another on a linear scale."""
HEIGHT = 2.6
"""Of the figure of gains, in inches."""


@styled
def error_panels(by_kind: Mapping[str, Sequence[Line]], measure: str, width: float) -> Figure:
    """A panel for each kind of linear with the lines of all models by block; `measure` names what goes up.

    The scales start at 0, or are logarithmic where some panel would hide a line at its bottom.
    """
    log = max(_spread(lines) for lines in by_kind.values()) > WIDEST
    columns = min(len(by_kind), 2 if width <= NARROW else 4)
    rows = -(-len(by_kind) // columns)
    figure, axes = panels(width, 0.75 + 1.45 * rows, rows, columns, sharex=True)
    names = short_names(list(by_kind))
    for place, (panel, (kind, lines)) in enumerate(zip(axes, by_kind.items(), strict=False)):
        for line in lines:
            _line(panel, line)
        panel.set_title(names[kind], fontsize=8.5)
        panel.tick_params(labelbottom=place + columns >= len(by_kind), labelsize=7)
        if log:
            panel.set_yscale("log")
            plain(panel)
        else:
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_locator(MaxNLocator(nbins=4))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    for panel in axes[len(by_kind) :]:
        panel.set_axis_off()
    figure.supxlabel("block", fontsize=8.5, color=colour("muted"))
    figure.supylabel(measure, fontsize=8.5, color=colour("muted"))
    key(figure, max(axes[: len(by_kind)], key=lambda panel: len(panel.lines)), columns=1 if width <= NARROW else 4)
    return figure


@styled
def gains(by_kind: Mapping[str, Sequence[tuple[int, float]]], width: float) -> Figure:
    """A line for each kind of linear with what the method gains on rounding by block, above zero where it is nearer."""
    figure, (axes,) = panels(width, HEIGHT)
    axes.axhline(0, color=colour("full"), linewidth=1)
    shades = {kind: ramp(place, len(by_kind)) for place, kind in enumerate(by_kind)}
    for kind, points in by_kind.items():
        axes.plot(*zip(*points, strict=True), color=shades[kind], marker="o", markersize=3, linewidth=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.margins(x=0.03)
    axes.set_xlabel("block")
    axes.set_ylabel("‖δW‖ rounded \N{MINUS SIGN} ‖δW‖ quantized")
    low, high = axes.get_ylim()
    scale = (HEIGHT - 0.6) * 72 / (high - low)
    levels = [points[-1][1] * scale for points in by_kind.values()]
    right = max(points[-1][0] for points in by_kind.values())
    names = short_names(list(by_kind))
    for (kind, points), level, moved in zip(by_kind.items(), levels, apart(levels, 10), strict=True):
        write(axes, names[kind], (right, points[-1][1]), offset=(7, moved - level), color=shades[kind])
    return figure


def _spread(lines: Sequence[Line]) -> float:
    """The highest peak of a line beside the lowest."""
    peaks = [max(value for _, value in line.points) for line in lines]
    return max(peaks) / min(peaks) if min(peaks) > 0 else 1.0


def _line(panel: Axes, line: Line) -> None:
    style, thickness = ("--", 1.1) if line.dashed else ("-", 1.4)
    mark = "o" if len(line.points) == 1 else None
    shade = colour(role(line.model))
    blocks, values = zip(*line.points, strict=True)
    panel.plot(blocks, values, color=shade, label=line.label, marker=mark, ms=4, linestyle=style, linewidth=thickness)
