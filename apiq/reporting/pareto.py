"""Loss against bits over all runs, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apiq.reporting import results
from apiq.reporting.gather import Run
from apiq.reporting.sweeps import DONE, Sweep
from apiq.reporting.units import known

THIS = "this run"
TUNED = "finetuned"


@dataclass(frozen=True)
class Point:
    """A model of a run."""

    run: str
    """THIS, or the sweep and the cell."""
    model: str
    """rtn, quantized, finetuned, ..."""
    bits: float
    """Effective bits per quantized weight, adapters included."""
    loss: float
    """Log perplexity above full precision in nats, the mean over all texts."""


Reference = tuple[tuple[str, float], ...]
"""Each text and the perplexity of the full-precision model on it; losses of different references do not compare."""


def collect(run: Run) -> dict[Reference, list[Point]]:
    """The points of this run and of every finished cell of a sweep that has them, by what they compare with.

    Equal points of the same model, as rounding to nearest in the cells of a sweep, are given once.
    """
    found: dict[Reference, dict[tuple[str, float, float], Point]] = {}
    for name, evaluation, total in [_this(run), *(each for sweep in run.sweeps for each in _cells(sweep))]:
        for point in points(name, evaluation, total):
            same = found.setdefault(_reference(evaluation), {})
            same.setdefault((point.model, point.bits, point.loss), point)
    return {reference: list(distinct.values()) for reference, distinct in found.items()}


def points(name: str, evaluation: results.Evaluation, total: Any) -> list[Point]:
    """The points of one run; a model has the effective bits that its evaluation names, or else `total`.

    The rounded model alone has no adapters: its bits are never the total.
    """
    found = []
    for model in results.models(evaluation):
        loss = results.mean_loss(evaluation, model)
        bits = evaluation[model].get("effective_bits", None if model == "rtn" else total)
        if model != "full" and loss is not None and known(bits):
            found.append(Point(name, model, bits, loss))
    return found


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats, which would have no more bits and no more loss, and less of one; by rising bits.

    Of equal points the first stands for all.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def frontiers(points: Sequence[Point]) -> dict[bool, list[Point]]:
    """The frontier of the models as they were quantized (False), and of those that were finetuned (True)."""
    return {tuned: frontier(point for point in points if (point.model == TUNED) is tuned) for tuned in (False, True)}


def _this(run: Run) -> tuple[str, results.Evaluation, Any]:
    return THIS, run.evaluation, run.quantization.get("effective_bits")


def _cells(sweep: Sweep) -> Iterable[tuple[str, results.Evaluation, Any]]:
    for cell in sweep.cells:
        if cell.status == DONE:
            name = f"{sweep.title}: {sweep.title_of(cell)}"
            yield name, _evaluation(cell.metrics), cell.metrics.get("effective_bits")


def _evaluation(metrics: Mapping[str, Any]) -> results.Evaluation:
    """What is in metrics by dotted key: `MODEL.perplexity.TEXT` and, of some, `MODEL.effective_bits`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        model, kind, text = (*key.split(".", 2), "", "")[:3]
        if kind == "perplexity" and text:
            found.setdefault(model, {}).setdefault(kind, {})[text] = value
        elif kind == "effective_bits":
            found.setdefault(model, {})[kind] = value
    return found


def _reference(evaluation: results.Evaluation) -> Reference:
    perplexities = {text: results.perplexity(evaluation, "full", text) for text in results.texts(evaluation)}
    return tuple(sorted((text, value) for text, value in perplexities.items() if value is not None))
