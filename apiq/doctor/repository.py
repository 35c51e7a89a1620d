"""git and DVC in a folder, asked through their own programs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apiq.doctor.finding import Finding

PATIENCE = 120
"""Seconds for `dvc status`, which may have to hash changed files."""


def check(folder: Path) -> Iterator[Finding]:
    """Whether `folder` is a clean git repository with DVC, and whether the outputs are those of the parameters."""
    yield _git(folder)
    if importlib.util.find_spec("dvc") is None:
        yield Finding(
            "dvc", "ok", "not installed; only the pipeline needs it", "pip install 'apiq[pipeline]' to have it"
        )
    elif not any((above / ".dvc").is_dir() for above in (folder.absolute(), *folder.absolute().parents)):
        yield Finding("dvc", "warning", "not initialised here", "work in a clone of the project, or dvc init")
    else:
        yield _dvc(folder)


def _git(folder: Path) -> Finding:
    if shutil.which("git") is None:
        return Finding("git", "warning", "not installed", "install git: DVC's experiments and comparisons need it")
    inside = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=False)
    if inside.returncode:
        what, remedy = trouble(inside.stderr, folder)
        return Finding("git", "warning", what, f"{remedy}: DVC's experiments need it")
    changed = len(inside.stdout.splitlines())
    if changed:
        return Finding("git", "warning", f"{changed} files differ from the last commit", "git status, then git commit")
    return Finding("git", "ok", "a clean repository")


def trouble(told: str, folder: Path) -> tuple[str, str]:
    """What is wrong with a repository by what git told of it, and the remedy."""
    if "dubious ownership" in told:
        return "it belongs to another user", f"git config --global --add safe.directory {folder.absolute()}"
    if "not a git repository" in told:
        alone = (folder / ".dvc" / "config.local").exists()  # as `make setup` writes for a downloaded archive
        init = "git init" + (", then dvc config --local --unset core.no_scm" if alone else "")
        return "no repository here", f"work in a clone, or {init}"
    lines = [line for line in told.splitlines() if line.strip()]
    return lines[0] if lines else "git says nothing", "see git status"


def _dvc(folder: Path) -> Finding:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    try:
        asked = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("dvc", "warning", f"dvc status took more than {PATIENCE} s", "run dvc status by hand")
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding("dvc", "problem", f"dvc status fails: {reason}", "run dvc doctor, and dvc status by hand")
    return status(json.loads(asked.stdout or "{}"))


def status(changed: Mapping[str, Any]) -> Finding:
    """What `dvc status --json` says: the stages whose inputs or outputs changed."""
    if not changed:
        return Finding("dvc", "ok", "all outputs are up to date")
    return Finding("dvc", "warning", f"not up to date: {', '.join(changed)}", "dvc repro")
