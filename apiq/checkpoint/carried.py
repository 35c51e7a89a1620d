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
    carry_terms(original, folder)
    if (original / GENERATION).is_file():
        shutil.copyfile(original / GENERATION, folder / GENERATION)
    elif derived is not None:
        derived.to_json_file(folder / GENERATION)


def carry_terms(original: Path, folder: Path) -> None:
    """Copy the terms of use alone, for a format that has its own way to say the rest."""
    for path in original.iterdir():
        if path.is_file() and path.name.lower().startswith(TERMS):
            shutil.copyfile(path, folder / path.name)
