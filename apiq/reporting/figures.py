"""The figures of the page other than histograms; each function draws its data at a given width in inches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from apiq.reporting.drawing import NARROW, apart, key, panels, styled, write
from apiq.reporting.gather import BlockLoss, Curve, TrainingLog
from apiq.reporting.palette import colour, ramp
from apiq.reporting.units import duration, memory, nats, number, power, short_names

ERROR = "mean squared error"
MARKERS = {"quantized": "o", "refined": "^", "finetuned": "D"}


@styled
def perplexities(damage: Mapping[str, Mapping[str, float]], labels: Mapping[str, str], width: float) -> Figure:
    """What each model loses on each text, in nats above the full-precision model.

    `damage[text][model]` is the difference in log perplexity; `labels[model]` its name in the key.
    """
    figure, (axes,) = panels(width, 0.95 + 0.42 * len(damage))
    for row, losses in enumerate(damage.values()):
        axes.vlines(0, row - 0.18, row + 0.45, color=colour("full"), linewidth=1.4)  # not through the labels above
        ends = [0.0, *losses.values()]
        axes.plot([min(ends), max(ends)], [row, row], color=colour("rule"), linewidth=1.2, zorder=1)
        for model, loss in losses.items():
            axes.plot(loss, row, MARKERS.get(model, "s"), color=colour(role(model)), markersize=6, clip_on=False)
    for model in dict.fromkeys(model for losses in damage.values() for model in losses):
        axes.plot([], [], MARKERS.get(model, "s"), color=colour(role(model)), label=labels[model], markersize=6)
    axes.plot([], [], color=colour("full"), label=labels["full"], linewidth=1.4)
    axes.set_yticks(range(len(damage)), list(damage), color=colour("ink"))
    axes.set_ylim(len(damage) - 0.5, -0.75)
    axes.margins(x=0.08)
    axes.grid(axis="x")
    axes.grid(False, axis="y")
    axes.set_xlabel("log perplexity above full precision (nats)")
    key(figure, axes, columns=2 if width <= NARROW else 4)
    figure.draw_without_rendering()
    for row, losses in enumerate(damage.values()):
        origin, *places = (float(axes.transData.transform((loss, row))[0]) for loss in (0.0, *losses.values()))
        spread = apart(places, 38, origin + 20 if min(losses.values()) >= 0 else -math.inf)  # right of the names
        for (model, loss), place, moved in zip(losses.items(), places, spread, strict=True):
            offset = (moved - place, 7)
            write(axes, nats(loss), (loss, row), role(model), offset=offset, ha="center", va="bottom")
    return figure


@styled
def block_losses(losses: Sequence[BlockLoss], width: float) -> Figure:
    """Error of each block before and after fitting, on a log scale, joined by a line; zero and unknown are left out."""
    figure, (axes,) = panels(width, 2.5)
    size = 5 if len(losses) <= 40 else 3
    for block in losses:
        if block.first and block.last:
            axes.vlines(block.block, block.last, block.first, color=colour("rule"), linewidth=1.2)
    fitted = [(block.block, block.last) for block in losses if block.last]
    unfitted = [(block.block, block.first) for block in losses if block.first and block.first != block.last]
    for name, points, role, face in (
        ("before fitting", unfitted, "full", "paper"),
        ("after fitting" if unfitted else "after rounding", fitted, "quantized", "quantized"),
    ):
        if points:
            style = {"color": colour(role), "markerfacecolor": colour(face), "markersize": size, "linestyle": ""}
            axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
    axes.set_yscale("log")
    plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if width <= NARROW else 16))
    axes.set_xlim(-0.5, len(losses) - 0.5)
    axes.set_xlabel("block")
    axes.set_ylabel(ERROR)
    key(figure, axes, columns=2)
    return figure


@styled
def loss_curves(curves: Sequence[Curve], width: float) -> Figure:
    """Loss by epoch on a log scale: one panel for each group of layers, one line for each block (blue to vermilion)."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.group, []).append(curve)
    columns = min(len(groups), 2 if width <= NARROW else 4)
    rows = -(-len(groups) // columns)
    height = 1.9 if columns == 1 else 1.2
    figure, axes = panels(width, 0.5 + (height + 0.25) * rows, rows, columns, sharex=True)
    names = short_names(list(groups))
    for panel, lines in zip(axes, groups.values(), strict=False):
        for index, curve in enumerate(lines):
            mark = "o" if len(curve.epochs) == 1 else None
            panel.plot(curve.epochs, curve.losses, marker=mark, ms=4, color=ramp(index, len(lines)), linewidth=1.2)
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if columns == 1 else 3))
        plain(panel)
        _name_lines(panel, lines, height, few=len(groups) > 1)
    for place, (panel, group) in enumerate(zip(axes, groups, strict=False)):
        panel.tick_params(labelbottom=place + columns >= len(groups), labelsize=8 if len(groups) == 1 else 7)
        panel.set_title(names[group] if len(groups) > 1 else "", fontsize=8.5)
    for panel in axes[len(groups) :]:
        panel.set_axis_off()
    figure.supxlabel("epoch", fontsize=8.5, color=colour("muted"))
    figure.supylabel(ERROR, fontsize=8.5, color=colour("muted"))
    return figure


def _name_lines(axes: Axes, lines: Sequence[Curve], height: float, few: bool) -> None:
    """Write the block at the right end of the lines: of the first and last if `few`, or if all have no room."""
    ends = [(curve.epochs[-1], curve.losses[-1]) for curve in lines]
    named = {0, len(lines) - 1} if few or len(lines) > height * 72 / 11 else set(range(len(lines)))
    low, high = (math.log(limit) for limit in axes.get_ylim())
    levels = {index: (math.log(ends[index][1]) - low) / (high - low) * height * 72 for index in sorted(named)}
    for (index, level), moved in zip(levels.items(), apart(list(levels.values()), 10), strict=True):
        block = lines[index].block
        text = f"block {block}" if index == 0 and not few else str(block)
        write(axes, text, ends[index], offset=(5, moved - level), color=ramp(index, len(lines)))


@styled
def effective_bits(parts: Mapping[str, float], labels: Mapping[str, str], width: float) -> Figure:
    """Bits per quantized weight as one bar, cut into its parts; `labels[part]` is the name of a part in the key."""
    figure, (axes,) = panels(width, 1.25 if width > NARROW else 1.45)
    start, total = 0.0, sum(parts.values())
    for part, bits in parts.items():
        label = f"{labels[part]} {number(bits)}"
        axes.barh(0, bits, left=start, color=colour(part), height=0.6, label=label, linewidth=0)
        start += bits
    write(axes, number(total), (total, 0), offset=(5, 0), fontsize=9, fontweight="bold")
    axes.set_yticks([])
    axes.set_xlim(0, total * 1.12)
    axes.grid(axis="x")
    axes.set_xlabel("bits per quantized weight")
    key(figure, axes, columns=len(parts) if width > NARROW else 2)
    return figure


@styled
def cost(seconds: Mapping[str, float], mebibytes: Mapping[str, float], width: float) -> Figure:
    """Time on the clock and peak memory of each phase, as bars with their values."""
    phases = list(dict.fromkeys([*seconds, *mebibytes]))
    rows, columns = (2, 1) if width <= NARROW else (1, 2)
    figure, axes = panels(width, (0.55 + 0.3 * len(phases)) * rows, rows, columns, sharey=columns == 2)
    for panel, values, title, written in (
        (axes[0], seconds, "time on the clock", duration),
        (axes[1], mebibytes, "peak memory", memory),
    ):
        shown = {phases.index(phase): value for phase, value in values.items()}
        panel.barh(list(shown), list(shown.values()), color=colour("finetuned"), height=0.55, linewidth=0)
        for place, value in shown.items():
            write(panel, written(value), (value, place), offset=(4, 0))
        panel.set_yticks(range(len(phases)), phases, color=colour("ink"))
        panel.set_ylim(len(phases) - 0.5, -0.5)
        panel.set_xlim(0, 1.02 * max(shown.values(), default=1) or 1)
        panel.set_xticks([])
        panel.spines["bottom"].set_visible(False)
        panel.grid(False)
        panel.set_title(title)
    return figure


@styled
def finetuning(log: TrainingLog, width: float) -> Figure:
    """Training and held-out loss by step."""
    figure, (axes,) = panels(width, 2.5)
    ends = []
    for name, points, role, thickness, mark in (
        ("training", log.training, "full", 0.7, None),
        ("held out", log.held_out, "finetuned", 1.6, "o"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour(role), linewidth=thickness, marker=mark, markersize=4)
            ends.append((name, points[-1], role))
    axes.margins(x=0.02, y=0.1)
    low, high = axes.get_ylim()
    levels = [(point[1] - low) / (high - low) * 140 for _, point, _ in ends]
    right = max(point[0] for _, point, _ in ends)
    for (name, point, role), level, moved in zip(ends, levels, apart(levels, 11), strict=True):
        write(axes, f"{name} {number(point[1])}", (right, point[1]), role, offset=(6, moved - level))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    return figure


def role(model: str) -> str:
    """The colour role of a model of the evaluation."""
    return model if model in ("full", "quantized", "refined", "finetuned") else "baseline"


def plain(axes: Axes) -> None:
    """Ticks of a log axis as numbers, also where it spans less than a decade."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if low >= 1e-4 else power(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
