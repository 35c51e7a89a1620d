"""What became of a cell, kept in its folder so that no later run repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apiq.files import read_json, write_json
from apiq.overrides import leaves

RECORD = "cell.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    status: str
    """done, failed or refused."""
    error: str | None = None
    """One sentence, where it is not done."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Of data/metrics.json by their paths, and timing.STAGE.KEY: seconds, cpu_seconds, peak_memory_mb."""
    kept: tuple[str, ...] = ()
    """Files beside the record."""


def measured(data: str | Path) -> dict[str, Any]:
    """The metrics that a run left in its folder data/, with what each stage cost.

    Raises:
        ApiqError: they are not there or damaged.
    """
    data = Path(data)
    costs = {path.stem: read_json(path) for path in sorted((data / "timing").glob("*.json"))}
    return leaves(read_json(data / "metrics.json")) | leaves({"timing": costs})


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
