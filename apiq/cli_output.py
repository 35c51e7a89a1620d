"""What the commands print: progress and everything of the libraries on stderr, the result on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from apiq.progress import silent


@contextlib.contextmanager
def working(phase: str) -> Iterator[Any]:
    """Progress on stderr; whatever a library prints goes there too."""
    from apiq.terminal import progress_bar

    with contextlib.redirect_stdout(sys.stderr), progress_bar(phase) as progress:
        yield progress if _leads() else silent


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object or as a table; of several processes only the first does."""
    if not _leads():
        return
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        if not isinstance(value, Mapping | list):
            table.add_row(key.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
        elif value:
            table.add_row(key.replace("_", " "), json.dumps(value, indent=1))
    Console().print(table)


def _leads() -> bool:
    """Whether this is the one of several processes that torchrun started which speaks for all."""
    return os.environ.get("RANK", "0") == "0"
