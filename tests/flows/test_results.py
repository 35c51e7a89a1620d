"""What a run leaves to look at."""

import json
import subprocess
from pathlib import Path

from flows.results import keep_report, metrics_rows, summary

GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")


def write(root: Path, metrics: dict) -> None:
    (root / "data").mkdir(exist_ok=True)
    (root / "data/metrics.json").write_text(json.dumps(metrics))


def test_metrics_stand_beside_the_committed_ones(tmp_path: Path) -> None:
    write(tmp_path, {"full": {"perplexity": {"demo": 8.0}}, "gone": 1})
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "Measure"]):
        subprocess.run([*GIT, *arguments], cwd=tmp_path, check=True)
    write(
        tmp_path, {"full": {"perplexity": {"demo": 8.5}}, "quantized": {"perplexity": {"demo": 9.0}}, "method": "rtn"}
    )
    assert metrics_rows(tmp_path) == [
        {"metric": "full.perplexity.demo", "now": 8.5, "last commit": 8.0, "change": 0.5},
        {"metric": "quantized.perplexity.demo", "now": 9.0, "last commit": None, "change": None},
        {"metric": "method", "now": "rtn", "last commit": None, "change": None},
    ]


def test_metrics_can_be_shown_without_git(tmp_path: Path) -> None:
    write(tmp_path, {"perplexity": 8.0})
    assert metrics_rows(tmp_path) == [{"metric": "perplexity", "now": 8.0, "last commit": None, "change": None}]


def test_each_run_keeps_its_report(tmp_path: Path) -> None:
    page = tmp_path / "data/report/report.html"
    page.parent.mkdir(parents=True)
    page.write_text("first")
    first = keep_report("wise-owl", tmp_path)
    page.write_text("second")
    assert first.read_text() == "first"
    assert keep_report("old-cat", tmp_path).read_text() == "second"


def test_the_summary_says_how_to_go_on(tmp_path: Path) -> None:
    page = summary({"model": "Unchanged", "quantize": "Ran"}, "bits-3", tmp_path / "a.html")
    assert "| quantize | Ran |" in page
    assert (tmp_path / "a.html").as_uri() in page
    assert "dvc exp apply bits-3" in page
    assert "dvc exp" not in summary({}, None, tmp_path / "a.html")
