"""The command `apiq sweep`."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from apiq.cli_options import Json, Set
from apiq.cli_output import show
from apiq.errors import ApiqError
from apiq.files import read_json


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file: what varies, the table and figure to make of it.")],
    profile: Annotated[str | None, typer.Option(help="Another model that the file has settings for.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A local folder, or a hub NAME@REVISION, in the place of that of params.yaml.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Text to calibrate on: a file, folder or name.")] = None,
    text: Annotated[str | None, typer.Option(help="Text to measure perplexity on: a file, folder or name.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    runner: Annotated[
        Literal["threads", "processes", "dask", "ray"],
        typer.Option(help="What runs them: threads, processes, dask or ray (the last two are installed apart)."),
    ] = "threads",
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of a cell, the same alone and beside others, so that the bits are too.")
    ] = 1,
    listed: Annotated[bool, typer.Option("--list", help="Show the cells and run none.")] = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Compare: run every cell of a sweep FILE as a DVC experiment, then write its table and figure to data/sweeps.

    [bold]Example:[/bold] apiq sweep experiments/small-models.yaml --model ./my-model --calibration train.txt
    --text test.txt --jobs 2

    Cells that are done are not run again: a stopped sweep goes on when the same command is given, and a cell
    that failed is tried again. docs/reference/sweeps.md says how to write a file.
    """
    from apiq.sweeps.cells import Local, plan

    model, calibration, text = (_absolute(place) for place in (model, calibration, text))
    planned = plan(file, profile, Local(model, calibration, text), settings or (), threads)
    if listed:
        _show_cells(planned, as_json)
        return
    run = _flow()
    folder = Path("data/sweeps") / planned.name
    earlier = _written(folder)
    with contextlib.redirect_stdout(sys.stderr):
        state = run(str(file.resolve()), profile, model, calibration, text, settings, jobs, runner, threads)
    if _written(folder) != earlier:
        _show_results(folder, as_json)
    if not state.is_completed():
        raise ApiqError(f"{str(state.message).removesuffix('.')}.")


def _written(folder: Path) -> int | None:
    """When the results of a sweep were written last."""
    path = folder / "table.md"
    return path.stat().st_mtime_ns if path.is_file() else None


def _show_results(folder: Path, as_json: bool) -> None:
    if as_json:
        show(read_json(folder / "cells.json"), True)
    else:
        Console().print((folder / "table.md").read_text(encoding="utf-8"), soft_wrap=True, markup=False)


def _absolute(place: str | None) -> str | None:
    """A file or folder so that it is found from the repository too; a name as it is."""
    return str(Path(place).resolve()) if place and Path(place).exists() else place


def _flow() -> Any:
    """The flow, which stands a floor above this library and needs Prefect and DVC: here for this command alone."""
    try:
        flow = importlib.import_module("flows.sweep")
    except ModuleNotFoundError as error:
        if error.name not in ("flows", "prefect", "dvc"):
            raise
        raise ApiqError(
            f"apiq sweep needs {error.name}, which is not here; clone the repository, run pip install -e '.[flows]' "
            "in it, and start the sweep there."
        ) from None
    if Path.cwd().resolve() != flow.ROOT:
        raise ApiqError(
            f"a sweep takes params.yaml and code from its repository; start it in {flow.ROOT}, not in {Path.cwd()}."
        )
    return flow.run_here


def _show_cells(planned: Any, as_json: bool) -> None:
    if as_json:
        cells = [{"name": cell.name, "changes": cell.changes, "refused": cell.refused} for cell in planned.cells]
        show({"name": planned.name, "cells": cells}, True)
        return
    for cell in planned.cells:
        told = escape(", ".join(f"{axis} {label}" for axis, label in cell.labels.items()))
        refused = f" [yellow]refused: {escape(cell.refused)}[/yellow]" if cell.refused else ""
        Console().print(f"{escape(cell.name)}  [dim]{told}[/dim]{refused}", soft_wrap=True, highlight=False)
