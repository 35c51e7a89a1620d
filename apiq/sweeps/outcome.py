"""What became of a cell, kept in its folder so that no later run repeats it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apiq.files import read_json, write_json
from apiq.overrides import leaves
from apiq.reporting.units import known

RECORD = "cell.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    status: str
    """done, failed or refused."""
    error: str | None = None
    """One sentence, where it is not done."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Of data/metrics.json by their paths; lost.MODEL.TEXT, nats a token above full precision; and timing.STAGE.KEY:
    seconds, cpu_seconds, peak_memory_mb, where the stage `fitting` is quantize and refine together."""
    kept: tuple[str, ...] = ()
    """Files beside the record."""


def measured(data: str | Path) -> dict[str, Any]:
    """The metrics that a run left in its folder data/, with what each model loses and each stage cost.

    Raises:
        ApiqError: they are not there or damaged.
    """
    data = Path(data)
    costs = {path.stem: read_json(path) for path in sorted((data / "timing").glob("*.json"))}
    fitting = [costs[stage] for stage in ("quantize", "refine") if stage in costs]
    if fitting:
        keys = ("seconds", "cpu_seconds")
        costs["fitting"] = {key: sum(cost[key] for cost in fitting) for key in keys if all(key in c for c in fitting)}
    metrics = read_json(data / "metrics.json")
    return leaves(metrics) | leaves({"lost": lost(metrics), "timing": costs})


def lost(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Log perplexity above the full-precision model, in nats a token, by model and text."""
    perplexities = {
        model: values["perplexity"]
        for model, values in metrics.items()
        if isinstance(values, Mapping) and isinstance(values.get("perplexity"), Mapping)
    }
    full = perplexities.pop("full", {})
    return {
        model: {text: math.log(value / full[text]) for text, value in texts.items() if _both(value, full.get(text))}
        for model, texts in perplexities.items()
    }


def _both(*values: Any) -> bool:
    return all(known(value) and value > 0 for value in values)


def remember(folder: str | Path, outcome: Outcome) -> None:
    """Write the record of a cell to its folder: from then on the cell is not run again."""
    write_json(Path(folder) / RECORD, vars(outcome))


def remembered(folder: str | Path) -> Outcome | None:
    """The outcome that an earlier run recorded; None if there is none, or the cell failed."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    outcome = Outcome(**{**(record := read_json(path)), "kept": tuple(record["kept"])})
    return outcome if outcome.status == "done" else None
