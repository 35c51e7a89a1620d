"""Checkpoints on the Hugging Face hub: their folder in the hub's cache, made whole."""

from __future__ import annotations

from pathlib import Path

from apiq.checkpoint import manifest
from apiq.errors import ApiqError

ADAPTER = ["adapter/*.json", "adapter/*.safetensors"]


def fetched(name: str) -> Path:
    """The folder in the hub's cache with the model of a repository (`NAME` or `NAME@REVISION`) and its adapters.

    Raises:
        ApiqError: there is no such repository or revision, or it cannot be reached.
    """
    from apiq.models.source import snapshot

    repository, _, revision = name.partition("@")
    folder = snapshot(repository, revision or None)
    complete(folder)
    return folder


def complete(folder: Path) -> None:
    """Fetch into a folder of the hub's cache what a download of the model leaves out: apiq.json and all that it lists.

    transformers asks for the files that it reads only, and a folder with less than apiq.json lists counts as cut
    off. Of a repository without apiq.json the adapters are fetched. A folder elsewhere stays as it is.

    Raises:
        ApiqError: the hub refuses.
    """
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        return
    if not (folder / manifest.NAME).is_file():
        _fetch(folder, [manifest.NAME, *ADAPTER])
    listed = (manifest.read(folder) or {"files": {}})["files"]
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        _fetch(folder, missing)


def _fetch(folder: Path, patterns: list[str]) -> None:
    """Download files of the commit that `folder` is named after to where it is: CACHE/models--OWNER--NAME/snapshots."""
    from huggingface_hub import snapshot_download

    repository = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    try:
        snapshot_download(repository, revision=folder.name, cache_dir=folder.parents[2], allow_patterns=patterns)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(f"the rest of {repository} cannot be had from the Hugging Face hub: {reason}.") from error
