"""Effective bits per parameter of a quantized model on disk: everything it takes to compute its linears."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apiq.checkpoint.adapter_file import adapter_file
from apiq.checkpoint.layout import INDEX
from apiq.errors import ApiqError
from apiq.files import read_json

PARTS = {"codes": ("codes",), "scales": ("scales", "scale_ranges", "scale_mean"), "zeros": ("zeros", "offsets")}
"""The tensors of a packed linear by what they are counted as."""
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U8": 8, "I8": 8}


@dataclass(frozen=True)
class Bits:
    """Bits per quantized weight, by what they are spent on. Biases, norms and embeddings are not counted."""

    codes: float
    scales: float
    zeros: float
    adapters: float
    total: float
    weights: int
    """Number of quantized weights, the denominator."""

    def as_dict(self) -> dict[str, float]:
        """The fields as a mapping."""
        return asdict(self)


def effective_bits(folder: str | Path, adapter: str | Path | None = None) -> Bits:
    """Count the bits on disk of a checkpoint, with the adapter in `adapter` or else its own `adapter/`.

    Raises:
        ApiqError: no packed linear is in the folder.
    """
    folder = Path(folder)
    index = read_json(folder / INDEX)
    headers = {file: read_header(folder / file) for file in sorted(set(index["weight_map"].values()))}
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    shapes = index["metadata"].get("shapes", {})
    spent = {
        part: sum(_size(entries.get(f"{name}.{tensor}")) for name in shapes for tensor in tensors)
        for part, tensors in PARTS.items()
    }
    weights = sum(math.prod(shape) for shape in shapes.values())
    if not weights:
        raise ApiqError(f"{folder} holds no packed linears to count the bits of.")
    low_rank = adapter_file(Path(adapter or folder / "adapter"))
    extra = 0
    if low_rank is not None:
        extra = sum(_size(entry) for name, entry in read_header(low_rank).items() if name != "__metadata__")
    parts = {name: bits / weights for name, bits in {**spent, "adapters": extra}.items()}
    return Bits(**parts, total=sum(parts.values()), weights=weights)


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        ApiqError: the file is truncated or is not safetensors.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(length))
    except (struct.error, ValueError, OverflowError, MemoryError):
        raise ApiqError(f"{path} is damaged: it has no safetensors header.") from None


def _size(entry: dict[str, Any] | None) -> int:
    return 0 if entry is None else math.prod(entry["shape"]) * _BITS[entry["dtype"]]
