"""Run the pipeline on the profile `ci` and compare its metrics with those committed in ci/metrics.json.

`python -m ci.regression` works in a temporary copy of the tree, lets `dvc metrics diff` compare, and
fails when a metric moved past its tolerance of ci/tolerances.yaml, for better or worse, came or went.
`python -m ci.regression --update` writes what it measured to ci/metrics.json, for a change that is meant.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apiq.files import read_json, write_json
from apiq.overrides import read_yaml
from apiq.profiles import lay

ROOT = Path(__file__).parents[1]
METRICS = "ci/metrics.json"
DVC = (sys.executable, "-m", "dvc")


@dataclass(frozen=True)
class Tolerance:
    """How far a metric may move before it counts as a regression."""

    reason: str
    """Why it moves at all on another machine, or why not."""
    relative: float = 0.0
    """Share of the committed value."""
    absolute: float = 0.0
    """In the unit of the metric; added to the relative part."""

    def allowed(self, old: float) -> float:
        """The largest change of a metric whose committed value is `old`."""
        return self.absolute + self.relative * abs(old)


def judge(changes: Mapping[str, Mapping[str, Any]], tolerances: Mapping[str, Tolerance]) -> list[str]:
    """One sentence for each metric that is not as committed.

    Args:
        changes: `old` and `new` of every metric by its name, as in `dvc metrics diff --all --json`.
        tolerances: by a pattern of names; the first that fits a metric holds for it.
    """
    findings, used = [], set()
    for name, change in sorted(changes.items()):
        old, new = change.get("old"), change.get("new")
        pattern = next((pattern for pattern in tolerances if fnmatch.fnmatchcase(name, pattern)), None)
        used.add(pattern)
        if old is None or new is None:
            findings.append(f"{name} is {'new' if old is None else 'gone'}: it is {old} in {METRICS} and {new} now.")
        elif pattern is None:
            findings.append(f"{name} has no tolerance in ci/tolerances.yaml.")
        elif isinstance(old, str) or isinstance(new, str):
            findings += [] if old == new else [f"{name} went from {old} to {new}."]
        elif not math.isfinite(new) or abs(new - old) > tolerances[pattern].allowed(old):
            findings.append(f"{name} went from {old:g} to {new:g}; allowed is {tolerances[pattern].allowed(old):g}.")
    findings += [f"the tolerance of {pattern} fits no metric." for pattern in tolerances if pattern not in used]
    return findings if changes else ["there are no metrics to compare."]


def measure(copy: Path) -> dict[str, Any]:
    """Run the pipeline of the tree on the profile `ci` in the new folder `copy`; return what is to stay as it is."""
    copy_tree(copy)
    lay("ci", copy / "params.yaml")
    call(copy, *DVC, "repro")
    return summary(*(read_json(copy / "data" / name / "metrics.json") for name in ("quantized", "evaluation")))


def summary(quantized: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of two stages, with what shows damage better than the perplexities themselves.

    `lost` is the log perplexity above full precision, in nats a token; `error_left` the share of
    each block's error that fitting left.
    """
    perplexity = {model: found["perplexity"]["demo"] for model, found in evaluation.items()}
    full = perplexity["full"]
    return {
        "bits": quantized["bits"],
        "error_left": {block["name"]: block["loss_last"] / block["loss_first"] for block in quantized["blocks"]},
        "lost": {model: math.log(value / full) for model, value in perplexity.items() if model != "full"},
        "perplexity": perplexity,
    }


def copy_tree(copy: Path) -> None:
    """Commit the files of the tree that git tracks or would track, as they are now, to a repository of their own."""
    listed = call(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", read=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    call(copy, "git", "init", "--quiet")
    call(copy, "git", "add", "--all")
    who = ("-c", "user.name=ci", "-c", "user.email=ci@localhost", "-c", "commit.gpgsign=false")
    call(copy, "git", *who, "commit", "--quiet", "--message", "The tree as it is")


def changes_since_commit(copy: Path) -> dict[str, Any]:
    """Every metric of METRICS in the commit and in the working tree of `copy`."""
    command = [*DVC, "metrics", "diff", "--targets", METRICS, "--all", "--json"]
    return json.loads(call(copy, *command, read=True)).get(METRICS, {})


def call(folder: Path, *command: str, read: bool = False) -> str:
    """Run `command` in `folder` with this Python first on the path; return what it wrote to stdout if `read`.

    On one thread, so that sums are added in the same order whatever the number of cores.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    stdout = subprocess.PIPE if read else None
    done = subprocess.run(command, cwd=folder, env=environment, stdout=stdout, text=True, check=True)
    return done.stdout or ""


def main() -> int:
    """Run the command line; the exit status is 1 when a metric is not as committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write the metrics to {METRICS} instead of comparing")
    update = parser.parse_args().update
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "apiq"
        metrics = measure(copy)
        write_json((ROOT if update else copy) / METRICS, metrics)
        changes = {} if update else changes_since_commit(copy)
    if update:
        print(f"{METRICS} is written.")
        return 0
    for name, change in sorted(changes.items()):
        print(f"{name}: {change.get('old')} -> {change.get('new')}")
    tolerances = {pattern: Tolerance(**entry) for pattern, entry in read_yaml(ROOT / "ci/tolerances.yaml").items()}
    findings = judge(changes, tolerances)
    print("\n".join([*findings, "", f"Regression: {len(changes)} metrics, {len(findings)} findings."]))
    return 1 if findings else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:  # what it said stands above
        sys.exit(f"the regression check could not be made: {shlex.join(error.cmd)} failed.")
