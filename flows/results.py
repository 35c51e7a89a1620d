"""What a run leaves to look at: its metrics beside the committed ones, and its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from apiq.errors import ApiqError
from apiq.files import read_json
from apiq.overrides import leaves
from flows.workspace import METRICS, call


def metrics_rows(root: Path) -> list[dict[str, Any]]:
    """Rows of a table: each metric now, at the last commit where there is one, and the change.

    Raises:
        ApiqError: the metrics of this run are not there.
    """
    now = leaves(read_json(root / METRICS))
    try:
        before = leaves(json.loads(call(["git", "show", f"HEAD:{METRICS}"], root)))
    except ApiqError:  # no git, or nothing committed yet
        before = {}
    return [
        {"metric": name, "now": value, "last commit": before.get(name), "change": _change(before.get(name), value)}
        for name, value in now.items()
    ]


def _change(before: Any, now: Any) -> float | None:
    numbers = isinstance(before, int | float) and isinstance(now, int | float)
    return float(f"{now - before:.6g}") if numbers else None


def keep_report(run: str, root: Path) -> Path:
    """Copy the report to a place of this run, where no later run writes over it."""
    kept = root / ".prefect" / "reports" / f"{run}.html"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / "data" / "report" / "report.html", kept)
    return kept


def summary(outcomes: dict[str, str], experiment: str | None, report: Path) -> str:
    """A page in Markdown: what became of each stage, and the commands that go on from here."""
    lines = ["| stage | |", "|---|---|", *(f"| {stage} | {outcome} |" for stage, outcome in outcomes.items()), ""]
    lines += [f"Report: [{report.name}]({report.as_uri()})", ""]
    if experiment:
        lines += [
            f"Saved as the experiment **{experiment}**; the workspace is as it was.",
            "",
            "```",
            f"dvc metrics diff HEAD {experiment}",
            f"dvc exp apply {experiment}   # its parameters and outs here",
            "```",
        ]
    return "\n".join(lines) + "\n"
