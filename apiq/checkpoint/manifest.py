"""`apiq.json`: what a folder is, and the SHA-256 of each of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apiq.errors import ApiqError
from apiq.files import read_json, sha256, sha256_folder, write_json

NAME = "apiq.json"
FORMAT = 5
"""Version of the format; 2 brought other grids than the affine one, 3 grids by linear, 4 the balanced grid and offsets,
5 the ternary grid.

Older ones can be read."""
UNGUARDED = (NAME, "README.md", ".gitignore", ".gitattributes")
"""Files that may come and go beside a checkpoint."""


def write(folder: str | Path, kind: str, **facts: Any) -> None:
    """Write the manifest of `folder`, which must hold all its other files already.

    `kind` is `quantized`, `finetuned` or `not finetuned`; `facts` are what a reader needs besides the hashes.
    """
    files = {name: digest for name, digest in sha256_folder(folder).items() if name not in UNGUARDED}
    write_json(Path(folder) / NAME, {"format": FORMAT, "kind": kind, "files": files, **facts})


def read(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None if it has none.

    Raises:
        ApiqError: it is damaged or was written by a newer format.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(key), kind) for key, kind in (("format", int), ("kind", str), ("files", dict))
    ):
        raise ApiqError(
            f"{path} is damaged: it lacks its format, its kind or its list of files; make the folder again."
        )
    if manifest["format"] > FORMAT:
        raise ApiqError(
            f"{path} has format {manifest['format']}, this apiq reads up to {FORMAT}; install a newer apiq."
        )
    return manifest


def verify(folder: str | Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file in it was found whole.

    Raises:
        ApiqError: there is no manifest, or a file is missing or differs from it in a single bit.
    """
    manifest = read(folder)
    if manifest is None:
        raise ApiqError(f"{folder} is not an apiq checkpoint, or only half of one: it has no {NAME}.")
    for name, digest in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise ApiqError(f"{folder} is incomplete: {name} is missing; copy the folder again or make it again.")
        if sha256(path) != digest:
            raise ApiqError(f"{path} is damaged: its SHA-256 is not the one in {NAME}; copy it again or make it again.")
    return manifest
