"""Loss against bits with the efficient frontier: what is worth its bits."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apiq.reporting.drawing import NARROW, apart, key, panels, styled, write
from apiq.reporting.figures import MARKERS, plain, role
from apiq.reporting.palette import colour
from apiq.reporting.pareto import THIS, TUNED, Point, frontiers
from apiq.reporting.results import KNOWN_MODELS

FRONTIERS = {False: ("quantized", "frontier as quantized"), True: (TUNED, "frontier after finetuning")}


@styled
def pareto(points: Sequence[Point], width: float) -> Figure:
    """Every point by the marker of its model, filled for this run; each frontier a staircase with numbered corners."""
    figure, (axes,) = panels(width, 3.6)
    best = frontiers(points)
    bits = [point.bits for point in points]
    room = 0.06 * (max(bits) - min(bits) or max(bits))
    left, right = min(bits) - room, max(bits) + 2 * room
    for tuned, corners in best.items():
        _staircase(axes, corners, right, *FRONTIERS[tuned])
    for model in dict.fromkeys(point.model for point in points):
        _markers(axes, [point for point in points if point.model == model], model)
    if min(point.loss for point in points) > 0:
        axes.set_yscale("log")
        axes.margins(y=0.12)
        plain(axes)
    axes.set_xlim(left, right)
    axes.set_xlabel("effective bits per quantized weight")
    axes.set_ylabel("log perplexity lost (nats)")
    key(figure, axes, columns=1 if width <= NARROW else 3)
    _numbers(figure, axes, [(point, FRONTIERS[tuned][0]) for tuned, corners in best.items() for point in corners])
    return figure


def _staircase(axes: Axes, corners: Sequence[Point], right: float, shade: str, label: str) -> None:
    if corners:
        bits, losses = [point.bits for point in corners], [point.loss for point in corners]
        style = {"where": "post", "color": colour(shade), "linewidth": 1.1, "alpha": 0.55}
        axes.step([*bits, right], [*losses, losses[-1]], label=label, **style)


def _markers(axes: Axes, points: Sequence[Point], model: str) -> None:
    style = {"linestyle": "", "marker": MARKERS.get(model, "s"), "color": colour(role(model)), "clip_on": False}
    for own, size, face in ((False, 4.5, "paper"), (True, 7, role(model))):
        shown = [(point.bits, point.loss) for point in points if (point.run == THIS) is own]
        if shown:
            label = KNOWN_MODELS.get(model, model) + ("" if own else ", in a sweep")
            axes.plot(*zip(*shown, strict=True), markersize=size, markerfacecolor=colour(face), label=label, **style)


def _numbers(figure: Figure, axes: Axes, corners: Sequence[tuple[Point, str]]) -> None:
    """Write the number of each corner at its upper right, in the given colour role."""
    figure.draw_without_rendering()
    levels = [float(axes.transData.transform((point.bits, point.loss))[1]) for point, _ in corners]
    for place, ((point, shade), level, moved) in enumerate(zip(corners, levels, apart(levels, 10), strict=True), 1):
        at, offset = (point.bits, point.loss), (6, moved - level + 6)
        write(axes, str(place), at, shade, offset=offset, fontweight="bold")
