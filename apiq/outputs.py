"""Where results may go: asked before any work, so that no file of others is lost and no hour is spent in vain."""

from __future__ import annotations

import tempfile
from pathlib import Path

from apiq.checkpoint import manifest
from apiq.errors import ApiqError


def require_place(out: str | Path, *inputs: str | Path, mark: str | None = None) -> None:
    """Refuse a folder that cannot be written, or whose replacement would take something with it.

    Fine is a folder that is not there yet or is empty, and one that will be replaced: a checkpoint of apiq with nothing
    else in it, or, where `mark` is given, only a folder with the file `mark` that is no checkpoint.

    Raises:
        ApiqError: `out` is a file, the present folder or one above it, holds one of the `inputs` or other files,
            or nothing can be written where it is to be.
    """
    out = Path(out)
    place = out.resolve()
    if out.exists() and not out.is_dir():
        raise ApiqError(f"{out} is a file; give a folder to write to.")
    for taken in map(Path, inputs):
        if taken.exists() and (taken.resolve() == place or place in taken.resolve().parents):
            raise ApiqError(f"{out} holds {taken}, which is read here; give another folder to write to.")
    if place in (Path.cwd(), *Path.cwd().parents) or place.is_mount():
        raise ApiqError(f"{out} cannot be replaced as a whole; give a folder below it to write to.")
    others = _others(place) if mark is None else _unmarked(place, mark)
    if others:
        writer = "apiq" if mark is None else "an earlier run of this command"
        raise ApiqError(
            f"{out} holds what {writer} did not write there "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); "
            "give another folder to write to, or remove it."
        )
    _try(out)


def _others(folder: Path) -> list[str]:
    """The files and folders right in `folder` that are not of a checkpoint of apiq."""
    if not folder.is_dir():
        return []
    facts = manifest.read(folder)
    own = set() if facts is None else {name.partition("/")[0] for name in facts["files"]} | set(manifest.UNGUARDED)
    return sorted(path.name for path in folder.iterdir() if path.name not in own)


def _unmarked(folder: Path, mark: str) -> list[str]:
    """All that is right in `folder`, unless the file `mark` is there and the manifest of a checkpoint is not."""
    marked = (folder / mark).is_file() and not (folder / manifest.NAME).exists()
    return [] if marked or not folder.is_dir() else sorted(path.name for path in folder.iterdir())


def _try(out: Path) -> None:
    """Make a folder where `out` is to be, or where the first folder above it will be."""
    above = next(path for path in (out.resolve().parent, *out.resolve().parent.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=f".{out.name}."):
            pass
    except OSError as error:
        raise ApiqError(f"nothing can be written to {above} ({error.strerror}); give another folder.") from None
