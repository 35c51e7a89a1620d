"""A checkpoint with other scales and adapters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiq.checkpoint import manifest
from apiq.checkpoint.layout import INDEX
from apiq.files import new_folder, read_json


def rewritten(folder: Path, new: Path, scales: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> None:
    """Copy the checkpoint in `folder` to the folder `new`, all but its manifest, with other `scales` and `adapters`.

    `scales` are by the name of their linear in the model, `adapters` by the names that PEFT saves them by; each
    is written in the precision in which it was stored.
    """
    shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(manifest.NAME))
    places: dict[str, dict[str, Tensor]] = {}
    for name, file in read_json(folder / INDEX)["weight_map"].items():
        linear = name.removesuffix(".scales")
        if linear != name and linear in scales:
            places.setdefault(file, {})[name] = scales[linear]
    for file, values in places.items():
        _replace(new / file, values)
    if adapters:
        _replace(new / "adapter" / "adapter_model.safetensors", adapters)


def _replace(path: Path, values: Mapping[str, Tensor]) -> None:
    """Write a safetensors file anew with some of its tensors replaced."""
    tensors = load_file(path)
    for name, value in values.items():
        tensors[name] = value.detach().to(tensors[name].dtype).cpu().contiguous()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


def copied(folder: Path, out: Path) -> None:
    """The checkpoint in `folder` once more in `out`, as it is."""
    with new_folder(out) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
