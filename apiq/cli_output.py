"""What the commands print: progress and everything of the libraries on stderr, the result on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apiq.mishaps import GOES_ON
from apiq.progress import silent

RESUMED = ("quantize", "refine", "finetune")
"""Commands that take up what an earlier run of theirs has finished."""


@contextlib.contextmanager
def working(phase: str) -> Iterator[Any]:
    """Progress on stderr; whatever a library prints goes there too. Ctrl-C ends it with a sentence and status 130."""
    from apiq.terminal import progress_bar

    try:
        with contextlib.redirect_stdout(sys.stderr), progress_bar(phase) as progress:
            yield progress if _leads() else silent
    except KeyboardInterrupt:
        print(f"apiq: stopped{f'; {GOES_ON}' if phase in RESUMED else '.'}", file=sys.stderr)
        sys.exit(130)


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object, or what fits on a line each; of several processes only the first does."""
    if not _leads():
        return
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        if value is not None and value not in ({}, []):
            table.add_row(escape(key.replace("_", " ")), escape(_line(value)))
    Console().print(table)


def _line(value: Any) -> str:
    """A value for people: numbers short, small mappings in a row, and the number of what only --json shows whole."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, Mapping | list):
        return str(value)
    parts = value.values() if isinstance(value, Mapping) else value
    if any(isinstance(part, Mapping | list) for part in parts):
        return f"{len(value)}, shown by --json"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(part)}" for key, part in value.items() if part is not None)
    return ", ".join(map(_line, value))


def _leads() -> bool:
    """Whether this is the one of several processes that torchrun started which speaks for all."""
    return os.environ.get("RANK", "0") == "0"
