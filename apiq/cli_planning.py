"""The commands that look ahead: `apiq plan` and `apiq doctor`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from apiq.cli_options import Json, Set
from apiq.cli_output import show
from apiq.overrides import lay_over, override
from apiq.params import Params, parse

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def plan(
    profile: Annotated[
        str | None,
        typer.Argument(
            help="Name of a profile in params/, or a YAML file, laid over params.yaml; none for that alone."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Another model: a folder with config.json, or a hub NAME or NAME@REVISION.")
    ] = None,
    params: Annotated[
        Path | None,
        typer.Option(help="The file of parameters. [dim]\\[default: params.yaml][/dim]", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the result would go.")] = Path("data/quantized"),
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Try out one random block, for up to 20 s, to tell the time.")
    ] = True,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Say what a run would need before anything is loaded: bits, size, memory, disk, time.

    [bold]Example:[/bold] apiq plan llama2-7b-2bit --model ./folder-with-config.json

    Only config.json of the model is read. Nothing is written.
    """
    with contextlib.redirect_stdout(sys.stderr):
        from apiq.planning.plan import plan as foresee

        result = foresee(_parameters(profile, model, params, settings), out, timed)
    if as_json:
        show(result, True)
    else:
        _show(result)


def doctor(as_json: Json = False) -> None:
    """Check this machine: Python, packages, torch, memory, disk, hub, git and DVC.

    Exit status 1 if something will fail.
    """
    from apiq.doctor.examine import examine

    console, findings = Console(file=sys.stdout), []  # the real one, also where stdout is redirected
    with contextlib.redirect_stdout(sys.stderr):
        for finding in examine():
            findings.append(dataclasses.asdict(finding))
            if not as_json:
                colour = COLOURS[finding.status]
                fix = f" [dim]-> {escape(finding.fix)}[/dim]" if finding.fix else ""
                found = escape(f"{finding.name}: {finding.found}")
                console.print(f"[{colour}]{finding.status:8}[/{colour}]{found}{fix}", soft_wrap=True)
    problems = sum(finding["status"] == "problem" for finding in findings)
    if as_json:
        show({"checks": findings, "problems": problems}, True)
    if problems:
        raise typer.Exit(1)


def _parameters(profile: str | None, model: str | None, path: Path | None, settings: list[str] | None) -> Params:
    from apiq.profiles import laid

    values = override(laid(profile, path), settings or [])
    if model is not None:
        name, _, revision = (model, "", "") if Path(model).is_dir() else model.partition("@")
        values = lay_over(values, {"model": {"source": name, "revision": revision or None}})
    return parse(values)


def _show(result: Mapping[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(result):
        table.add_row(name, escape(value))
    Console().print(table)


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, made, bits = result["model"], result["result"], result["result"]["bits"]
    rows = [
        ("model", f"{model['source']} ({model['kind']}, {model['blocks']} blocks of width {model['width']})"),
        ("parameters", f"{model['parameters']:,} in {decimal(model['bytes'])}, "
                       f"of them quantized {model['quantized_weights']:,}"),
        ("effective bits", f"{bits['total']:.3f} = " + " + ".join(
            f"{part} {bits[part]:.3f}" for part in ("codes", "scales", "zeros", "adapters"))),
        ("result", f"{decimal(made['bytes'])}, of them adapters {decimal(made['adapter_bytes'])}"),
    ]  # fmt: skip
    for phase in ("quantize", "refine", "finetune", "evaluate"):
        if result[phase] is not None:
            rows += [(f"{phase}: {name}", value) for name, value in _needs(result[phase])]
    rows += [("offloaded", sentence) for sentence in result["offloaded"]]
    return rows + [("problem", sentence) for sentence in result["problems"] or ["none: all of it fits this machine"]]


def _needs(phase: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for place in ("gpu", "ram", "disk"):
        if phase.get(place):
            parts = ", ".join(f"{name} {decimal(size)}" for name, size in phase[place].items())
            rows.append((place, f"{decimal(sum(phase[place].values()))} ({parts})"))
    if "seconds" in phase:
        rows.append(("time", f"{_duration(phase['seconds'])} give or take {phase['uncertainty']:.0%}"))
    if "tokens_per_second" in phase:
        rows.append(
            ("speed", f"{phase['tokens_per_second']:,.0f} tokens a second, {phase['seconds_per_step']:.3g} s a step")
        )
    return rows


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
