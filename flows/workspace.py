"""The workspace that DVC works in: one flow run at a time, and as it was once an experiment is saved."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apiq.doctor.repository import trouble
from apiq.errors import ApiqError
from apiq.profiles import change

METRICS = "data/metrics.json"
PARAMS = "params.yaml"
KEPT = (PARAMS, "dvc.lock", METRICS)
"""What an experiment changes besides the outs that DVC's cache holds."""
SET = "params.set.yaml"
"""Beside what is kept: the parameters as the run set them."""
LONGEST = 100
"""Letters of the changes in the name of an experiment, which is that of a file."""
POLL = 2.0
"""Seconds between two looks at a workspace that is in use."""


def dvc(*arguments: str) -> list[str]:
    """The command line of DVC in this environment."""
    return [sys.executable, "-m", "dvc", *arguments]


def call(command: Sequence[str], root: Path) -> str:
    """Run a short command and return what it prints.

    Raises:
        ApiqError: it fails, with the line that says why or its last one, or is not there.
    """
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ApiqError(f"there is no program {command[0]} on this machine.") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr.strip() or done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith(("ERROR", "fatal"))), lines[-1] if lines else None)
        shown = " ".join(part for part in command[1:] if part != "-m")
        raise ApiqError(f"`{shown}` failed: {reason or f'status {done.returncode}'}")
    return done.stdout


@contextlib.contextmanager
def alone(root: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other flow run works in `root`, and keep others out until the block ends.

    The lock belongs to the process: nothing is left of it when the process dies.
    """
    path = root / ".prefect" / "workspace.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    tell("another flow run works in this folder; waiting for it to end.")
                told = True
                time.sleep(POLL)
        yield


def experiment_name(changes: Mapping[str, Any], run: str) -> str:
    """A name that git and DVC take, from what is changed and the name of the run: `quantize-bits-3-wise-owl`."""
    words = "-".join(f"{key}-{value}" for key, value in changes.items())[:LONGEST]
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{words}-{run}").strip("-")


def refuse_taken(name: str, root: Path) -> None:
    """Refuse the name of an experiment that is there or that cannot be one, or a folder where DVC can keep none.

    Raises:
        ApiqError: any of them.
    """
    try:
        call(["git", "rev-parse", "HEAD"], root)
    except ApiqError as error:
        what, remedy = trouble(str(error), root)
        raise ApiqError(
            f"{root} has no git commit, on which DVC hangs experiments ({what}): {remedy}, and commit."
        ) from None
    if "/" in name or not _is_reference(f"refs/exps/{name}", root):
        raise ApiqError(f"{name!r} cannot be the name of an experiment; take letters, digits and -.")
    if name in call(dvc("exp", "list", "--name-only"), root).split():
        raise ApiqError(f"there is an experiment {name} already; choose another name, or `dvc exp remove {name}`.")


def _is_reference(name: str, root: Path) -> bool:
    return subprocess.run(["git", "check-ref-format", name], cwd=root, check=False).returncode == 0


@contextlib.contextmanager
def changed(changes: Mapping[str, Any], root: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Set keys of params.yaml while the block runs; then bring the workspace back to where it was.

    Also after a failure or a cancelled run. What a killed run could not bring back, the next one does first, unless
    params.yaml was edited since.

    Raises:
        ApiqError: the parameters cannot be run; nothing has changed.
    """
    kept = root / ".prefect" / "kept"
    if kept.exists():
        tell("an interrupted run had changed the parameters.")
        _bring_back(kept, root, tell)
    if not changes:
        yield
        return
    _keep(kept, root)
    try:
        change(changes, root / PARAMS)
        shutil.copy2(root / PARAMS, kept / SET)
        yield
    finally:
        _bring_back(kept, root, tell)


def _keep(kept: Path, root: Path) -> None:
    fresh = kept.with_name("keeping")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in KEPT:
        if (root / name).exists():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, fresh / name)
    fresh.rename(kept)


def _bring_back(kept: Path, root: Path, tell: Callable[[str], None]) -> None:
    if (kept / SET).exists() and _content(kept / SET) != _content(root / PARAMS):
        tell(f"{PARAMS} was edited since a run changed it, and stays as it is.")
        shutil.rmtree(kept)
        return
    same = all(_content(kept / name) == _content(root / name) for name in KEPT)
    for name in KEPT:
        if (kept / name).exists():
            shutil.copy2(kept / name, root / name)
        else:
            (root / name).unlink(missing_ok=True)
    had_outs = (kept / "dvc.lock").exists()
    shutil.rmtree(kept)
    if had_outs and not same:
        try:
            call(dvc("checkout", "--quiet", "--force"), root)
        except ApiqError as error:
            tell(f"the outs are still those of the experiment ({error}); `dvc repro` brings the others back.")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
