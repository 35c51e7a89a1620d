"""The flow `apiq` as a sweep: the cells of one file, side by side, each a DVC experiment.

`apiq sweep FILE` runs it here and now, `python -m flows.serve` waits for `prefect deployment run apiq/sweep`.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed, State

from apiq.errors import ApiqError
from apiq.sweeps import results
from apiq.sweeps.cells import Cell, Local, Plan, plan
from apiq.sweeps.outcome import Outcome
from flows import ROOT, server
from flows.board import Board
from flows.cells import Bench, bench, run_cell
from flows.processes import stop_all

Runner = Literal["threads", "processes", "dask", "ray"]
RUNNERS: dict[str, tuple[str, str, Callable[[int], dict[str, Any]]]] = {
    "threads": ("prefect.task_runners", "ThreadPoolTaskRunner", lambda jobs: {"max_workers": jobs}),
    "processes": ("prefect.task_runners", "ProcessPoolTaskRunner", lambda jobs: {"max_workers": jobs}),
    "dask": ("prefect_dask", "DaskTaskRunner", lambda jobs: {"cluster_kwargs": {"n_workers": jobs}}),
    "ray": ("prefect_ray", "RayTaskRunner", lambda jobs: {"init_kwargs": {"num_cpus": jobs}}),
}
"""Where the class of a task runner is, and how many tasks it runs at once in its own words."""


@flow(name="apiq")
def sweep(
    file: str,
    profile: str | None = None,
    model: str | None = None,
    calibration: str | None = None,
    text: str | None = None,
    settings: list[str] | None = None,
    jobs: int = 1,
    runner: Runner = "threads",
    threads: int = 1,
) -> State:
    """Run every cell of a sweep file that has not been run, and write data/sweeps/NAME.

    Args:
        file: the sweep file, below experiments/ by custom.
        profile: name of a profile in it.
        model: a folder or hub name in the place of that of params.yaml.
        calibration: a corpus to calibrate on in the place of that of params.yaml.
        text: a corpus to measure perplexity on in the place of those of params.yaml.
        settings: changes for all cells, as in quantize.epochs=5.
        jobs: cells at a time.
        runner: what runs them: threads of this process, processes, Dask or Ray.
        threads: threads of each cell, whatever runs beside it.
    """
    try:
        with contextlib.chdir(ROOT):
            planned = plan(file, profile, Local(model, calibration, text), settings or (), threads)
            pool = task_runner(runner, jobs)
            with bench(ROOT, planned.name, planned.profile, planned.sweep.keep, threads) as on:
                outcomes = _run_all(planned, on, pool)
            results.write(on.folder.parent, planned, outcomes)
    except ApiqError as error:
        return Failed(message=str(error))
    create_markdown_artifact((on.folder.parent / "table.md").read_text(encoding="utf-8"), key=f"sweep-{planned.name}")
    return _verdict(planned, outcomes, on.folder.parent.relative_to(ROOT))


def run_here(*arguments: Any) -> State:
    """The flow in this process, whatever became of it."""
    server.start()
    return sweep(*arguments, return_state=True)


@task(task_run_name="{cell.name}", cache_policy=NO_CACHE)
def cell_task(cell: Cell, on: Bench) -> Outcome:
    """One cell, with its lines in Prefect's log."""
    return run_cell(cell, on, get_run_logger().info)


def _run_all(planned: Plan, on: Bench, pool: Any) -> dict[str, Outcome]:
    tell, board, outcomes = get_run_logger().info, Board(f"sweep-{planned.name}"), {}
    began, total = time.monotonic(), len(planned.cells)
    with pool, _stopping_at_once():
        futures = {pool.submit(cell_task, {"cell": cell, "on": on}): cell.name for cell in planned.cells}
        for future in as_completed(list(futures)):
            name = futures[future]
            outcomes[name] = _outcome(future)
            done = len(outcomes)
            left = (time.monotonic() - began) / done * (total - done)
            line = f"sweep {done}/{total} {done / total:.0%} {name} {outcomes[name].status} ETA {left:.0f} s"
            tell(line)
            board.show(line)
    return outcomes


@contextlib.contextmanager
def _stopping_at_once() -> Iterator[None]:
    """An interrupt ends the cells too, instead of waiting until they are done."""
    try:
        yield
    except BaseException:
        stop_all()
        raise


def _outcome(future: PrefectFuture[Outcome]) -> Outcome:
    """What became of a cell; a defect in one is told and does not stop the others."""
    try:
        return future.result()
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}")


def task_runner(name: Runner, jobs: int) -> Any:
    """What runs so many cells at a time.

    Raises:
        ApiqError: it needs a library that is not installed.
    """
    module, kind, arguments = RUNNERS[name]
    try:
        return getattr(importlib.import_module(module), kind)(**arguments(jobs))
    except ModuleNotFoundError as error:
        package = module.replace("_", "-")
        raise ApiqError(
            f"runner is {name}, for which {error.name} is not installed; run `pip install {package}`, or take threads."
        ) from None


def _verdict(planned: Plan, outcomes: dict[str, Outcome], folder: Path) -> State:
    failed: Sequence[str] = [name for name, outcome in outcomes.items() if outcome.status == "failed"]
    if not failed:
        return Completed(message=f"{len(outcomes)} cells are done; the table is {folder}/table.md")
    first = outcomes[failed[0]].error
    return Failed(
        message=f"{len(failed)} of {len(outcomes)} cells failed, {failed[0]} first ({first}); the table of the others "
        f"is {folder}/table.md, and the same command tries only the failed ones again"
    )
