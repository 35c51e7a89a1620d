"""The cells of a sweep: each a DVC experiment, run in a clone that shares DVC's cache with the repository."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from apiq.errors import ApiqError
from apiq.overrides import read_yaml
from apiq.profiles import change, lay
from apiq.sweeps.cells import Cell
from apiq.sweeps.outcome import Outcome, measured, remember, remembered
from apiq.work import fingerprint
from flows.pipeline import STAGES, reproduce
from flows.workspace import METRICS, call, dvc

ERRORS = "evaluation/errors.csv"
"""The errors by linear, kept of each cell whose evaluation wrote them."""


@dataclass(frozen=True)
class Bench:
    """What all cells of a sweep share."""

    root: Path
    """The repository."""
    tree: Path
    """A clone of it, as it was when the sweep began."""
    folder: Path
    """Where the results of the cells go, a folder each."""
    work: Path
    """For clones and locks; git-ignored."""
    unfinished: Path
    """For blocks that are done of a stage that is not, as APIQ_WORK."""
    profile: str | None
    """Laid over params.yaml of every cell first."""
    keep: tuple[str, ...]
    """Files below data/ to keep of every cell."""
    threads: int
    """Of a cell, whether it runs alone or beside others: their number decides the order of additions, and so bits."""

    @property
    def stages(self) -> tuple[str, ...]:
        """What a cell runs; the report only where a part of it is kept."""
        return STAGES if any(file.startswith("report/") for file in self.keep) else STAGES[:-1]


@contextlib.contextmanager
def bench(root: Path, name: str, profile: str | None, keep: list[str], threads: int) -> Iterator[Bench]:
    """What the cells of the sweep `name` share, among it the tree as it is now: later edits do not reach them.

    Raises:
        ApiqError: another process runs this sweep.
    """
    work = (root / ".prefect" / "sweeps").resolve()
    unfinished = Path(os.environ.get("APIQ_WORK") or root / ".apiq_work").resolve()
    (work / "locks").mkdir(parents=True, exist_ok=True)
    tree = work / "cells" / f"tree-of-{name}"
    try:
        lock = FileLock(work / "locks" / f"sweep-{name}", timeout=0).acquire()
    except Timeout:
        raise ApiqError(f"another process runs the sweep {name}; wait for it, or end it and start again.") from None
    with lock:
        try:
            _snapshot(root, tree)
            folder = root / "data" / "sweeps" / name / "cells"
            yield Bench(root, tree, folder, work, unfinished, profile, tuple(keep), threads)
        finally:
            shutil.rmtree(tree, ignore_errors=True)


def _snapshot(root: Path, tree: Path) -> None:
    """A clone of the repository with its uncommitted changes, on DVC's cache of the repository."""
    shutil.rmtree(tree, ignore_errors=True)
    cache = call(dvc("cache", "dir"), root).strip()
    call(["git", "clone", "--quiet", "--shared", "--no-tags", str(root), str(tree)], root)
    for listing in (["diff", "--name-only", "HEAD"], ["ls-files", "--others", "--exclude-standard"]):
        for file in filter(None, call(["git", *listing, "-z"], root).split("\0")):
            _copy(root / file, tree / file)
    _copy(root / ".dvc" / "config.local", tree / ".dvc" / "config.local")
    call(dvc("cache", "dir", "--local", str(root / cache)), tree)


def run_cell(cell: Cell, on: Bench, on_line: Callable[[str], None]) -> Outcome:
    """Run a cell, or give what an earlier run of it recorded. A failure is an outcome too, tried again next time."""
    if cell.refused is not None:
        return Outcome("refused", cell.refused)
    with FileLock(on.work / "locks" / cell.name):  # of another sweep with the same cell
        if (earlier := remembered(on.folder / cell.name)) is not None:
            return earlier
        try:
            with _clone(on, cell.name) as place:
                outcome = _run(cell, on, place, on_line)
        except ApiqError as error:
            outcome = Outcome("failed", str(error))
        remember(on.folder / cell.name, outcome)
    return outcome


def _run(cell: Cell, on: Bench, place: Path, on_line: Callable[[str], None]) -> Outcome:
    if on.profile is not None:
        lay(on.profile, place / "params.yaml")
    change(cell.settings, place / "params.yaml")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(on.threads))
    for stage in on.stages:
        with FileLock(on.work / "locks" / _work_of(stage, place)):  # the second cell takes it from DVC's cache
            reproduce(stage, place, on_line, {**threads, "APIQ_WORK": str(on.unfinished)})
    outcome = Outcome("done", None, measured(place / "data"), _keep(on, place / "data", on.folder / cell.name))
    _save(cell.name, on, place)
    return outcome


def _work_of(stage: str, place: Path) -> str:
    """A name for the work of a stage that is the same in all cells whose parameters so far are the same."""
    params = read_yaml(place / "params.yaml")
    deciding = {name: params.get(name) for name in STAGES[: STAGES.index(stage) + 1]}
    texts = params.get("evaluate", {}).get("perplexity")
    return f"{stage}-{fingerprint({**deciding, 'texts': texts if stage != 'model' else None})}"


def _keep(on: Bench, data: Path, folder: Path) -> tuple[str, ...]:
    """Copy what is to be kept of a finished cell; the names there."""
    wanted = [*([ERRORS] if (data / ERRORS).is_file() else []), *on.keep]
    folder.mkdir(parents=True, exist_ok=True)
    for file in wanted:
        if not (data / file).is_file():
            raise ApiqError(f"keep names {file}, which the cell did not write to data/; correct it in the sweep file.")
        shutil.copyfile(data / file, folder / Path(file).name)
    return tuple(dict.fromkeys(Path(file).name for file in wanted))


def _save(name: str, on: Bench, place: Path) -> None:
    """Make an experiment of the clone, and bring it to the repository."""
    untracked = filter(None, call(["git", "ls-files", "-z", "--others", "--exclude-standard"], place).split("\0"))
    included = [part for file in dict.fromkeys([*untracked, METRICS]) for part in ("--include-untracked", file)]
    call(dvc("exp", "save", "--name", name, *included, on.stages[-1]), place)
    with FileLock(on.work / "locks" / "fetch"):
        fetch_experiments(place, on.root)


def fetch_experiments(place: Path, root: Path) -> None:
    """Bring the experiments of a clone to the repository; those that it has stay, whatever git is configured to do."""
    options = ("--quiet", "--no-prune", "--no-prune-tags", "--no-tags", "--no-write-fetch-head")
    call(["git", "fetch", *options, str(place), "+refs/exps/*:refs/exps/*", "^refs/exps/exec/*"], root)


@contextlib.contextmanager
def _clone(on: Bench, name: str) -> Iterator[Path]:
    """The tree of the sweep in a folder of its own, which is gone afterwards."""
    place = on.work / "cells" / name
    _clear(place)
    try:
        shutil.copytree(on.tree, place, symlinks=True)
        yield place
    finally:
        _clear(place)


def _copy(source: Path, target: Path) -> None:
    """Make `target` what `source` is: the same file, or absent."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    else:
        target.unlink(missing_ok=True)


def _clear(place: Path) -> None:
    """Remove a clone, with the processes that a killed sweep has left in it."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(place):
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=10)
    shutil.rmtree(place, ignore_errors=True)
