"""What the commands share: windows of text, progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apiq.params import Params
from apiq.progress import silent


def calibration_windows(folder: Path, params: Params) -> Any:
    """Token windows (n, length) as the section calibration asks for, by the tokenizer in `folder`."""
    import torch

    from apiq.calibration.corpora import load_corpus
    from apiq.calibration.windows import sample_windows, tokenize
    from apiq.checkpoint.loading import read_tokenizer

    chosen = params.calibration
    corpus = load_corpus(chosen.corpus, split="train", column=chosen.column, join=chosen.join)
    tokens = tokenize(corpus.text, read_tokenizer(folder))
    return sample_windows(tokens, chosen.windows, chosen.length, torch.Generator().manual_seed(chosen.seed))


@contextlib.contextmanager
def working(phase: str) -> Iterator[Any]:
    """Progress on stderr; whatever a library prints goes there too."""
    from apiq.terminal import progress_bar

    with contextlib.redirect_stdout(sys.stderr), progress_bar(phase) as progress:
        yield progress if _leads() else silent


def _leads() -> bool:
    """Whether this is the one of several processes that torchrun started which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print what a command found on stdout: one JSON object, or a table for people."""
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
