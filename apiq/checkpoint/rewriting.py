"""A checkpoint with other scales and adapters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiq.checkpoint import manifest
from apiq.checkpoint.adapter_file import is_rounded, read_adapter, write_adapter_file
from apiq.checkpoint.layout import INDEX
from apiq.files import new_folder, read_json
from apiq.grids.absmax import rounded


def rewritten(
    folder: Path,
    new: Path,
    scales: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    adapter_bits: int | None = None,
) -> None:
    """Copy the checkpoint in `folder` to the folder `new`, all but its manifest, with other `scales` and `adapters`.

    `scales` are by the name of their linear in the model, `adapters` by the names that PEFT saves them by; each
    is written in the precision in which it was stored, or the matrices of the adapters in `adapter_bits`.
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
        before = read_adapter(folder / "adapter")
        write_adapter_file(new / "adapter", before | _narrowed(adapters, before), adapter_bits)


def as_read(folder: Path, adapters: Mapping[str, Tensor], adapter_bits: int | None = None) -> dict[str, Tensor]:
    """What is read of `adapters` once `rewritten` has written them."""
    values = _narrowed(adapters, read_adapter(folder / "adapter", adapters)) if adapters else {}
    if adapter_bits is None:
        return values
    return {name: rounded(value, adapter_bits) if is_rounded(name, value) else value for name, value in values.items()}


def _narrowed(adapters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to(before[name].dtype) for name, value in adapters.items()}


def without_adapters(folder: Path, new: Path) -> None:
    """Copy the checkpoint in `folder` to the folder `new`, all but its manifest and its adapters."""
    shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(manifest.NAME, "adapter"))


def put_offsets(path: Path, offsets: Mapping[str, Tensor]) -> None:
    """Add offsets (out, G), float32, to a weight file by the names of their linears."""
    _replace(path, {f"{name}.offsets": value for name, value in offsets.items()})


def _replace(path: Path, values: Mapping[str, Tensor]) -> None:
    """Write a safetensors file anew with some of its tensors replaced, or with more of them."""
    tensors = load_file(path)
    for name, value in values.items():
        dtype = tensors[name].dtype if name in tensors else value.dtype
        tensors[name] = value.detach().to(dtype).cpu().contiguous()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


def copied(folder: Path, out: Path) -> None:
    """The checkpoint in `folder` once more in `out`, as it is."""
    with new_folder(out) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
