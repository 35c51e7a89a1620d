"""Where unfinished work waits to be taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fingerprint(identity: Mapping[str, Any]) -> str:
    """A short hash of everything that decides a result: parameters, input hashes, code version."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def work_folder(identity: Mapping[str, Any]) -> Path:
    """The folder for the unfinished work that `identity` decides: in `$APIQ_WORK`, else in `.apiq_work/` here.

    It is made if it is not there; whoever asked for it removes it when the output stands.
    """
    root = Path(os.environ.get("APIQ_WORK") or ".apiq_work")
    folder = root / fingerprint(identity)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def code_version() -> str:
    """SHA-256 of the source of this package, so that work begun by other code is not taken up."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
