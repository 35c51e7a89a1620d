"""What a checkpoint has from its original as it is: the settings of generation and the terms of use."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import GenerationConfig

from apiq.models.manifest import TERMS

GENERATION = "generation_config.json"


def carry(original: Path, folder: Path, derived: GenerationConfig | None) -> None:
    """Copy from `original` to `folder` what holds for both.

    `derived` is what config.json says of generation, written where the original has no file that says it.
    """
    for path in original.iterdir():
        if path.is_file() and (path.name == GENERATION or path.name.lower().startswith(TERMS)):
            shutil.copyfile(path, folder / path.name)
    if derived is not None and not (folder / GENERATION).exists():
        derived.to_json_file(folder / GENERATION)
