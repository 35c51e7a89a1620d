"""What stands in the place of a finetuned model where nothing was finetuned (finetune.task: none)."""

from __future__ import annotations

from pathlib import Path

from apiq.checkpoint import manifest
from apiq.files import new_folder, relative

KIND = "not finetuned"


def write(quantized: str | Path, out: str | Path) -> None:
    """Write to `out` a manifest alone, of kind `not finetuned`, with the relative path of the quantized folder."""
    with new_folder(out) as new:
        manifest.write(new, KIND, base=relative(quantized, out))


def is_skipped(folder: str | Path) -> bool:
    """Whether `folder` says that nothing was finetuned."""
    facts = manifest.read(folder)
    return facts is not None and facts["kind"] == KIND
