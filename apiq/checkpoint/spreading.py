"""A model larger than the memory of its device is spread over the device, RAM and the disk by accelerate.

It then moves through the device layer by layer: slow, but the same numbers. Quantized models are a fraction of the
size, so this is for full-precision models that are measured beside them.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apiq.ram import free_ram
from apiq.work import work_root

SHARE = 0.8
"""Of free memory that weights may take; the rest is for activations and logits."""


def spread(files: Sequence[Path], stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that spread a model, or none where it fits `device`.

    Args:
        files: its safetensors files.
        stored: precision of the weights in them.
        dtype: precision to load them in.
        device: where it is to be computed.
    """
    size = sum(path.stat().st_size for path in files) * dtype.itemsize / stored.itemsize
    rooms = _rooms(device)
    if not rooms or size <= next(iter(rooms.values())):
        return {}
    work_root().mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="spread.", dir=work_root())
    return {"device_map": "auto", "max_memory": rooms, "offload_folder": folder}


def forget_with(model: nn.Module, folder: str) -> None:
    """Remove what was put on disk in `folder` when `model` is gone."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def _rooms(device: torch.device) -> dict[int | str, int]:
    """Bytes that weights may take on the device, and in RAM beside a GPU; the disk takes what is left."""
    ram = int(SHARE * free_ram())
    if device.type == "cpu":
        return {"cpu": ram}
    if device.type == "cuda":
        return {device.index or 0: int(SHARE * torch.cuda.mem_get_info(device)[0]), "cpu": ram}
    return {}
