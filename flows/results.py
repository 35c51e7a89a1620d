"""What a run leaves to look at: its metrics beside the committed ones, and its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flows.workspace import call, dvc


def metrics_rows(diff: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of a table from `dvc metrics diff --all --json`: each metric now, at the last commit, and the change."""
    return [
        {"metric": name, "now": values.get("new"), "last commit": values.get("old"), "change": values.get("diff")}
        for metrics in diff.values()
        for name, values in sorted(metrics.items())
    ]


def read_metrics(root: Path) -> list[dict[str, Any]]:
    """The rows of `metrics_rows` for the workspace.

    Raises:
        ApiqError: DVC cannot read the metrics.
    """
    return metrics_rows(json.loads(call(dvc("metrics", "diff", "--all", "--json"), root) or "{}"))


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
