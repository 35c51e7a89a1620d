"""Histograms of one block as small multiples, one panel for each of its linears (Figure 5 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from apiq.reporting.drawing import NARROW, key, panels, styled
from apiq.reporting.palette import colour
from apiq.reporting.units import short_names
from apiq.reporting.weights import Histogram, LinearShape

ROLES = {"W": "fill", "Q": "codes", "A Bᵀ": "quantized", "A": "adapters", "B": "baseline"}
FLOOR = 1e-9
"""Stands for an empty bin on the log scale, far below what is shown."""


@styled
def weight_histograms(shapes: Sequence[LinearShape], width: float) -> Figure:
    """W (filled), Q and A B^T of each linear on a log scale."""
    return _multiples(shapes, width, [shape.weights for shape in shapes], "value")


@styled
def adapter_histograms(shapes: Sequence[LinearShape], width: float) -> Figure:
    """A and B of each linear on a log scale."""
    return _multiples(shapes, width, [shape.adapters for shape in shapes], "value")


@styled
def code_histograms(shapes: Sequence[LinearShape], width: float) -> Figure:
    """How often each code is used in each linear."""
    figure, axes = _grid(shapes, width)
    for panel, shape in zip(axes, shapes, strict=False):
        codes = np.arange(len(shape.codes))
        panel.bar(codes, shape.codes, width=0.75, color=colour("codes"), linewidth=0)
        panel.set_xticks(codes if len(codes) <= 8 else codes[:: len(codes) // 4])
        panel.yaxis.set_major_locator(MaxNLocator(nbins=3))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    figure.supxlabel("code", fontsize=8.5, color=colour("muted"))
    figure.supylabel("share of weights", fontsize=8.5, color=colour("muted"))
    return figure


def _multiples(shapes: Sequence[LinearShape], width: float, drawn: Sequence[dict[str, Histogram]], axis: str) -> Figure:
    figure, axes = _grid(shapes, width)
    for panel, histograms in zip(axes, drawn, strict=False):
        for name, histogram in histograms.items():
            _outline(panel, histogram, name)
        panel.set_yscale("log")
        panel.set_ylim(bottom=1e-5)
        panel.set_yticks([1e-4, 1e-2, 1], ["0.01 %", "1 %", "100 %"])
        panel.xaxis.set_major_locator(MaxNLocator(nbins=3, symmetric=True))
    figure.supxlabel(axis, fontsize=8.5, color=colour("muted"))
    figure.supylabel("share of entries in a bin", fontsize=8.5, color=colour("muted"))
    key(figure, axes[0], columns=3)
    return figure


def _outline(panel: Axes, histogram: Histogram, name: str) -> None:
    shares = np.maximum(histogram.shares, FLOOR)
    filled, shade = name == "W", colour(ROLES[name])
    panel.stairs(
        shares, histogram.edges, baseline=FLOOR, fill=filled, color=shade, label=name, linewidth=0 if filled else 1.1
    )


def _grid(shapes: Sequence[LinearShape], width: float) -> tuple[Figure, list[Axes]]:
    columns = min(len(shapes), 2 if width <= NARROW else 4)
    rows = -(-len(shapes) // columns)
    figure, axes = panels(width, 0.5 + 1.25 * rows, rows, columns, sharey=True)
    names = short_names([shape.name for shape in shapes])
    for panel, shape in zip(axes, shapes, strict=False):
        panel.set_title(names[shape.name], fontsize=8.5)
        panel.tick_params(labelsize=7.5)
    for panel in axes[len(shapes) :]:
        panel.set_axis_off()
    return figure, axes
