"""What the figures and the table make of the errors: lines by block for each kind of linear, means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from apiq.reporting.errors import BLOCK, LinearErrors
from apiq.reporting.results import KNOWN_MODELS

BASELINE, METHOD = "rtn", "quantized"
Measure = Callable[[LinearErrors], float | None]


@dataclass(frozen=True)
class Line:
    """One measure of one model by block."""

    label: str
    model: str
    dashed: bool
    points: tuple[tuple[int, float], ...]
    """(block, value); what is not known is left out."""


def weight_panels(errors: Sequence[LinearErrors]) -> dict[str, list[Line]]:
    """||W - (Q + A B^T)|| by kind of linear: rounded, quantized without and with adapters (Figure A.1)."""
    wanted: list[tuple[str, str, bool, Measure]] = [
        (KNOWN_MODELS[BASELINE], BASELINE, False, lambda row: row.weight_error),
        ("quantized, without adapters", METHOD, True, lambda row: row.weight_error_without),
        ("quantized", METHOD, False, lambda row: row.weight_error),
    ]
    if all(row.weight_error_with is None for row in errors):
        del wanted[1]
    return _panels([row for row in errors if row.kind != BLOCK], wanted)


def activation_panels(errors: Sequence[LinearErrors]) -> dict[str, list[Line]]:
    """||X W - Xq (Q + A B^T)|| for one token by kind of linear, the block first (Figure 4)."""
    wanted: list[tuple[str, str, bool, Measure]] = [
        (KNOWN_MODELS[BASELINE], BASELINE, False, lambda row: row.activation_error_accumulated),
        ("quantized, full-precision input", METHOD, True, lambda row: row.activation_error_own),
        ("quantized", METHOD, False, lambda row: row.activation_error_accumulated),
    ]
    return _panels(errors, wanted)


def gains(errors: Sequence[LinearErrors]) -> dict[str, tuple[tuple[int, float], ...]]:
    """By kind of linear and block, how much nearer to W the quantized weight is than the rounded one (Figure 3).

    That is ||W - Q of rtn|| - ||W - (Q + A B^T)||; empty without rtn.
    """
    linears = [row for row in errors if row.kind != BLOCK]
    found: dict[str, tuple[tuple[int, float], ...]] = {}
    for kind in _kinds(linears):
        baseline, method = (
            dict(_points(linears, kind, model, lambda row: row.weight_error)) for model in (BASELINE, METHOD)
        )
        found[kind] = tuple((block, baseline[block] - method[block]) for block in method if block in baseline)
    return {kind: points for kind, points in found.items() if points}


def mean_share(errors: Iterable[LinearErrors], model: str, kind: str, error: Measure, norm: Measure) -> float | None:
    """The mean over all blocks of an error divided by its norm; None if it is not known."""
    pairs = [(error(row), norm(row)) for row in errors if row.model == model and row.kind == kind]
    shares = [value / size for value, size in pairs if value is not None and size]
    return fmean(shares) if shares else None


def _panels(errors: Sequence[LinearErrors], wanted: Sequence[tuple[str, str, bool, Measure]]) -> dict[str, list[Line]]:
    panels = {
        kind: [
            Line(label, model, dashed, points)
            for label, model, dashed, measure in wanted
            if (points := _points(errors, kind, model, measure))
        ]
        for kind in _kinds(errors)
    }
    return {kind: lines for kind, lines in panels.items() if lines}


def _kinds(errors: Sequence[LinearErrors]) -> list[str]:
    return list(dict.fromkeys(row.kind for row in errors))


def _points(errors: Sequence[LinearErrors], kind: str, model: str, measure: Measure) -> tuple[tuple[int, float], ...]:
    """A measure by block; the mean over the linears of one kind, as the experts of a mixture."""
    values: dict[int, list[float]] = {}
    for row in errors:
        value = measure(row) if row.model == model and row.kind == kind else None
        if value is not None:
            values.setdefault(row.block, []).append(value)
    return tuple((block, fmean(each)) for block, each in sorted(values.items()))
