"""Unfinished work of stopped runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from apiq.doctor.finding import Finding


def check() -> Iterator[Finding]:
    """What waits in `$APIQ_WORK`, else in `.apiq_work/` here."""
    yield leftovers(Path(os.environ.get("APIQ_WORK") or ".apiq_work"), time.time())


def leftovers(root: Path, now: float) -> Finding:
    """Size and age of the folders in `root`; `now` in seconds since the epoch."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        return Finding("unfinished work", "ok", "none")
    files = [path.stat() for folder in folders for path in (folder, *folder.rglob("*"))]
    days = (now - max(file.st_mtime for file in files)) / 86400
    size = decimal(sum(file.st_size for file in files))
    return Finding(
        "unfinished work", "warning",
        f"{len(folders)} runs with {size} in {root}, the newest {days:.1f} days old",
        f"give the same command again to go on with one, or rm -r {root} when nothing runs, to forget all",
    )  # fmt: skip
