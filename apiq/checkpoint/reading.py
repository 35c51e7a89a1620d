"""Single linears of a checkpoint, for tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apiq.checkpoint.adapter_file import adapter_file, read_adapter
from apiq.checkpoint.grid_config import grid_for
from apiq.checkpoint.layout import INDEX
from apiq.errors import ApiqError
from apiq.files import read_json
from apiq.grids.affine import Grid
from apiq.layers.packed import PackedLinear


@dataclass(frozen=True)
class LinearWeights:
    """The parts of one quantized linear: X Q^T + scaling X A^T B^T, in PEFT's orientation of A and B."""

    Q: Tensor
    """Dequantized weight (out, in), float32."""
    codes: Tensor
    """Codes (out, in), uint8."""
    A: Tensor | None
    """(r, in), or None where the linear carries no LoRA, the only adapter that is a sum with A and B."""
    B: Tensor | None
    """(out, r), or None likewise."""
    scaling: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    grid: Grid
    """What the codes mean."""


def linear_names(folder: str | Path) -> list[str]:
    """The packed linears of a checkpoint by their name in the model, in the order of the blocks."""
    places = read_json(Path(folder) / INDEX)["weight_map"]
    names = [name.removesuffix(".codes") for name in places if name.endswith(".codes")]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])


def linear(folder: str | Path, name: str, adapter: str | Path | None = None) -> LinearWeights:
    """Read the packed linear `name`, as in `model.layers.0.mlp.up_proj`, with its adapters.

    `adapter` is another adapter folder than the checkpoint's own, a finetuned one for example.

    Raises:
        ApiqError: the folder has no such linear, or its file is damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json").get("quantization_config", {})
    grid = grid_for(config, name.removeprefix(f"{config['blocks']}."))
    index = read_json(folder / INDEX)
    place = index["weight_map"].get(f"{name}.codes")
    shape = index["metadata"].get("shapes", {}).get(name)
    if place is None or shape is None:
        raise ApiqError(f"{folder} has no packed linear {name}.")
    try:
        with safe_open(folder / place, framework="pt") as file:
            out_features, in_features = shape
            packed = PackedLinear(in_features, out_features, grid, False, torch.float32)
            for part in dict(packed.named_buffers()):
                setattr(packed, part, file.get_tensor(f"{name}.{part}"))
    except SafetensorError as error:
        raise ApiqError(f"{folder / place} is damaged: {error}.") from None
    A, B, scaling = _adapters(Path(adapter or folder / "adapter"), name)
    return LinearWeights(packed.dequantized(), packed.unpacked()[0], A, B, scaling, grid)


def _adapters(folder: Path, name: str) -> tuple[Tensor | None, Tensor | None, float]:
    if adapter_file(folder) is None:
        return None, None, 0.0
    config = read_json(folder / "adapter_config.json")
    if config["peft_type"] != "LORA" or config["use_dora"]:
        return None, None, 0.0
    keys = [f"base_model.model.{name}.lora_{part}.weight" for part in "AB"]
    state = read_adapter(folder, keys)
    if len(state) < len(keys):
        return None, None, 0.0
    A, B = (state[key].float() for key in keys)
    return A, B, config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
