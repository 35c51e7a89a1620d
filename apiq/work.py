"""Where unfinished work waits to be taken up again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from apiq.errors import ApiqError


def fingerprint(identity: Mapping[str, Any]) -> str:
    """A short hash of everything that decides a result: parameters, input hashes, code version."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def work_folder(identity: Mapping[str, Any]) -> Path:
    """The folder for the unfinished work that `identity` decides: in `$APIQ_WORK`, else in `.apiq_work/` here.

    It is made if it is not there; whoever asked for it removes it when the output stands.
    """
    folder = work_root() / fingerprint(identity)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def work_root() -> Path:
    """Where unfinished work and what does not fit into memory go; it need not be there yet."""
    return Path(os.environ.get("APIQ_WORK") or ".apiq_work")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Hold the unfinished work in `folder` for the block; the lock goes with the process, however it ends.

    Raises:
        ApiqError: another process is at work there.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ApiqError(
            f"another process is doing this very work in {folder}; wait for it, or end it and start again."
        ) from None
    try:
        yield folder
    finally:
        lock.release()


def forget(folder: Path) -> None:
    """Remove finished work.

    It is renamed first: what a process that is killed meanwhile leaves is not taken for work to go on with.
    """
    doomed = folder.with_name(f".{folder.name}.done")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def code_version() -> str:
    """SHA-256 of the source of this package, so that work begun by other code is not taken up."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
