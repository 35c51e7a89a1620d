"""The full-precision model that a checkpoint was made from: known by its content, found where it was last seen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from apiq.errors import ApiqError
from apiq.files import sha256, write_text
from apiq.work import fingerprint

PARTS = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "*.model",
    "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
)  # fmt: skip
"""Files of a model folder that transformers computes with; notes and results may lie beside them."""


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model folder that decides what the model computes."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if any(map(path.match, PARTS))}


def remember(files: Mapping[str, str], folder: Path) -> None:
    """Note for this user that the model with these `files` is in `folder`; checkpoints hold no path of a machine."""
    with contextlib.suppress(OSError):  # a note that cannot be taken is asked for by `find`
        write_text(_note(fingerprint(files)), str(folder.resolve()))


def find(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Where the original of the checkpoint in `folder`, with the manifest `facts`, was when it was quantized.

    Raises:
        ApiqError: nobody has noted it here, or it is not there any more.
    """
    note = _note(str(facts.get("original")))
    place = Path(note.read_text(encoding="utf-8")) if note.is_file() else None
    if place is None or not place.is_dir():
        seen = "it was not quantized here" if place is None else f"it is not at {place} any more"
        raise ApiqError(f"the full-precision model of {folder} is not known, {seen}; say where it is with --model.")
    return place


def require_original(facts: Mapping[str, Any], folder: Path, model: Path) -> None:
    """Refuse a model that is not the one which the checkpoint in `folder` was made from.

    Raises:
        ApiqError: its files differ from those that were quantized.
    """
    known = facts.get("original")
    if known is not None and known != fingerprint(content(model)):
        raise ApiqError(f"{model} is not the model that {folder} was made from: their files differ; give that one.")


def _note(digest: str) -> Path:
    return Path(os.environ.get("APIQ_CACHE") or user_cache_path("apiq")) / "originals" / digest
