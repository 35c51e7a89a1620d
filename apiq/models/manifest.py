"""`model.json`: which model a stage folder stands for, and the SHA-256 of each of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apiq.errors import ApiqError
from apiq.files import read_json, sha256, write_json
from apiq.progress import Progress, Step, silent

NAME = "model.json"
SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""What a model is made of: configuration, weights, tokenizer. Nothing that would have to be unpickled or run."""
TERMS = ("license", "licence", "notice", "use_policy")
"""How the names of files with terms of use begin, in lower case."""


def write(folder: Path, model: Path, facts: dict[str, Any], progress: Progress = silent) -> dict[str, Any]:
    """Write into `folder` what the model in the folder `model` is: `facts` and the hash of each file.

    Returns:
        The manifest.
    """
    names = sorted(path.name for path in model.iterdir() if path.suffix in SUFFIXES and path.name != NAME)
    hashes = {}
    for done, name in enumerate(names, start=1):
        hashes[name] = sha256(model / name)
        progress(Step("hashes", done, len(names), name))
    manifest = {**facts, "files": hashes}
    write_json(folder / NAME, manifest)
    return manifest


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None if there is none; a model may have a file of that name for something else.

    Raises:
        ApiqError: it is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"kind", "source", "files"} <= manifest.keys():
        if (folder / "config.json").is_file():
            return None
        raise ApiqError(f"{path} is damaged: it does not say what model it stands for; run the model stage again.")
    return manifest


def verify(manifest: dict[str, Any], model: Path) -> None:
    """Hold the files of a model against its manifest.

    Raises:
        ApiqError: a file is missing or changed.
    """
    for name, digest in manifest["files"].items():
        path = model / name
        if not path.is_file():
            raise ApiqError(f"{path} is missing, which {NAME} lists; put it back or run the model stage again.")
        if sha256(path) != digest:
            raise ApiqError(f"{path} is not the file that {NAME} describes; put it back or run the model stage again.")
