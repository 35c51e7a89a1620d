"""The file of the adapters: in PEFT's format, or with its matrices in 8 or 4 bits."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apiq.grids.absmax import GROUP, decode, encode
from apiq.grids.packing import pack, unpack

WHOLE = "adapter_model.safetensors"
"""What PEFT reads."""
PACKED = "adapter_packed.safetensors"
"""In few bits; `apiq` alone reads it."""
FACTS = "apiq"
"""The only key of its metadata: safetensors writes several in another order every time."""


def adapter_file(folder: Path) -> Path | None:
    """The file of the adapters in `folder`; None where there is none."""
    return next((folder / name for name in (WHOLE, PACKED) if (folder / name).exists()), None)


def is_rounded(name: str, value: Tensor) -> bool:
    """Whether a tensor of an adapter is stored in few bits where bits are saved: all matrices are."""
    return value.is_floating_point() and value.ndim >= 2


def read_adapter(folder: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of the adapters in `folder` by PEFT's names, or those of `names` that are there.

    Each is in the precision in which it was given to `write_adapter_file`.
    """
    path = adapter_file(folder)
    if path is None:
        raise FileNotFoundError(folder / WHOLE)
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
        kinds = facts.get("tensors", {})
        known = kinds or dict.fromkeys(file.keys())
        wanted = [name for name in known if names is None or name in names]
        if not kinds:
            return {name: file.get_tensor(name) for name in wanted}
        return {name: _restored(file, name, *kinds[name], bits=facts["bits"]) for name in wanted}


def _restored(file: Any, name: str, dtype: str, shape: list[int], bits: int) -> Tensor:
    if f"{name}.codes" not in file.keys():  # noqa: SIM118 (not a mapping)
        return file.get_tensor(name)
    codes = unpack(file.get_tensor(f"{name}.codes"), bits, GROUP)
    return decode(codes, file.get_tensor(f"{name}.scales"), bits, shape).to(getattr(torch, dtype))


def write_adapter_file(folder: Path, state: Mapping[str, Tensor], bits: int | None = None) -> None:
    """Write the tensors of the adapters to `folder`, matrices in so many `bits`, or all as they are without."""
    values = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    for name in (WHOLE, PACKED):
        (folder / name).unlink(missing_ok=True)
    if bits is None:
        save_file(values, folder / WHOLE)
        return
    tensors, kinds = {}, {}
    for name, value in sorted(values.items()):
        kinds[name] = [str(value.dtype).removeprefix("torch."), list(value.shape)]
        if not is_rounded(name, value):
            tensors[name] = value
            continue
        codes, tensors[f"{name}.scales"] = encode(value, bits)
        tensors[f"{name}.codes"] = pack(codes, bits)
    save_file(tensors, folder / PACKED, {FACTS: json.dumps({"bits": bits, "tensors": kinds}, sort_keys=True)})
