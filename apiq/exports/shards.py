"""Writing an export in the folder layout of transformers: shards, index, config, tokenizer, adapter beside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from apiq.checkpoint.adapter_file import read_adapter, write_adapter_file
from apiq.checkpoint.layout import INDEX
from apiq.checkpoint.writing import stored
from apiq.errors import ApiqError
from apiq.exports.source import Linear, Source
from apiq.files import read_json, write_json

OWN = ("apiq.json", "config.json", "metrics.json", "losses.csv", "README.md", INDEX)
"""Files of a quantized folder that mean nothing in an export, or that it has its own of."""

Tensors = Callable[[list[Linear]], Mapping[str, Tensor]]


def write_folder(
    source: Source, folder: Path, tensors: Tensors, dtype: torch.dtype, quantization: Mapping[str, Any] | None = None
) -> None:
    """Write `source` to `folder` with `tensors` in the place of those of the packed linears of each file.

    Everything else is cast to `dtype`. `quantization` becomes the quantization_config.

    Raises:
        ApiqError: a number is too large for `dtype`.
    """
    places: dict[str, str] = {}
    for file, others, linears in source.files():
        held = {**{name: cast(value, dtype, name) for name, value in others.items()}, **tensors(linears)}
        save_file({name: held[name].contiguous() for name in sorted(held)}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file)
    total = sum((folder / file).stat().st_size for file in set(places.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | ({"quantization_config": quantization} if quantization else {}))
    for path in source.folder.iterdir():
        if path.is_file() and path.name not in OWN and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)


def each(tensors: Callable[[Linear], Mapping[str, Tensor]]) -> Tensors:
    """`tensors` of one linear for all those of a file."""
    return lambda linears: {key: value for linear in linears for key, value in tensors(linear).items()}


def write_adapter(source: Source, folder: Path) -> None:
    """Put the adapter in PEFT's format into `folder`/adapter; its base is the folder above."""
    if source.adapter is None:
        return
    (folder / "adapter").mkdir()
    write_adapter_file(folder / "adapter", read_adapter(source.adapter))
    config = read_json(source.adapter / "adapter_config.json")
    write_json(folder / "adapter/adapter_config.json", config | {"base_model_name_or_path": ".."})


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`value` in `dtype`, or as it is if it holds whole numbers.

    Raises:
        ApiqError: it has numbers that are infinite there.
    """
    converted = stored(value, dtype)
    if not bool(torch.isfinite(converted).all()):
        raise ApiqError(
            f"{name} holds {float(value.abs().max()):.4g}, too large for {str(dtype).removeprefix('torch.')}; "
            "export with --dtype float32."
        )
    return converted
