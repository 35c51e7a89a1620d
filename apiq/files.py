"""Files that are whole or absent: hashes, canonical JSON, folders that appear in one rename."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from apiq.errors import ApiqError

LARGE = 1 << 26
"""Bytes from which a file is hashed once a process as long as nobody writes to it: models are checked at every turn."""


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    facts = os.stat(path)
    if facts.st_size < LARGE:
        return _hashed(os.fspath(path))
    return _remembered(os.path.abspath(path), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _remembered(path: str, *_: int) -> str:
    return _hashed(path)


def _hashed(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative POSIX path."""
    root = Path(folder)
    return {path.relative_to(root).as_posix(): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ApiqError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ApiqError(f"there is no file {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ApiqError(f"{path} is damaged: it is not JSON.") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys, atomically: the same value gives the same bytes.

    Raises:
        ValueError: a number is not finite (JSON has no NaN).
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file through a temporary neighbour and one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def relative(path: str | Path, start: str | Path) -> str:
    """The way from the folder `start` to `path` for a reader who follows symlinks: `..` leaves the real folder."""
    path = Path(path)
    return os.path.relpath(path.parent.resolve() / path.name, Path(start).resolve())


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that takes its place, and its old content's, when the block succeeds.

    A symlink stays, and what it leads to is written. If the block raises, nothing is left of the neighbour and `path`
    is as it was. Who looks at `path` finds the old folder or the new one, also after a crash. Neighbours of processes
    that were killed on this machine are removed.

    Raises:
        ApiqError: `path` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ApiqError(f"{path} is a file; give a folder to write to.")
    if path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{platform.node()}-"
    _sweep(path, prefix)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{prefix}{os.getpid()}-"))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        for file in temporary.rglob("*"):
            os.chmod(file, 0o755 if file.is_dir() else 0o644)
        if not path.exists():
            os.replace(temporary, path)
        elif not exchange(temporary, path):
            _displace(temporary, path, f"{prefix}{os.getpid()}-old-")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; false where the system cannot: Linux can, on local file systems."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2)."""


def _displace(temporary: Path, path: Path, prefix: str) -> None:
    """Put `temporary` in the place of `path` in two steps; killed between them, the next `_sweep` puts it back."""
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        os.replace(path, old / path.name)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(old / path.name, path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path, prefix: str) -> None:
    """Remove what killed processes left beside `path`, and put back what they had displaced."""
    for stale in path.parent.glob(f"{glob.escape(prefix)}*"):
        owner, _, rest = stale.name.removeprefix(prefix).partition("-")
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            if rest.startswith("old-") and (stale / path.name).exists() and not path.exists():
                os.replace(stale / path.name, path)
            shutil.rmtree(stale, ignore_errors=True)
