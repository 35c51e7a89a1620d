"""Writing a quantized model: one safetensors file a block, one for the rest, an index, the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apiq.checkpoint.adapter_file import write_adapter_file
from apiq.checkpoint.layout import INDEX
from apiq.files import write_json
from apiq.layers.packed import SCALE_PARTS, PackedLinear


def write_block(path: Path, block: nn.Module, prefix: str, dtype: torch.dtype) -> None:
    """Write the tensors of a block whose linears are packed, under the names of the whole model.

    Norms and biases are written in `dtype`, that of the original model, codes and scales as they are.
    """
    tensors = {f"{prefix}.{name}": _plain(name, value, dtype) for name, value in _without_adapters(block).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def shapes(block: nn.Module, prefix: str) -> dict[str, list[int]]:
    """Shape [out, in] of each packed linear of a block, which its words do not tell."""
    return {
        f"{prefix}.{name.removesuffix('.base_layer')}": [module.out_features, module.in_features]
        for name, module in block.named_modules()
        if isinstance(module, PackedLinear)
    }


def write_rest(path: Path, model: nn.Module, blocks: str, dtype: torch.dtype) -> None:
    """Write what lies outside the blocks, in `dtype`: embeddings, last norm, head. Tied tensors are written once."""
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in model.state_dict().items():
        if name.startswith(f"{blocks}.") or value.data_ptr() in written:
            continue
        written.add(value.data_ptr())
        tensors[name] = _plain(name, value, dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def write_index(folder: Path, files: Iterable[str], shapes: Mapping[str, list[int]]) -> None:
    """Write the index: for transformers, in which file each tensor is; for anyone, the shape of each packed linear."""
    places: dict[str, str] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            places.update(dict.fromkeys(tensors.keys(), file))
    total = sum((folder / file).stat().st_size for file in files)
    write_json(folder / INDEX, {"metadata": {"total_size": total, "shapes": shapes}, "weight_map": places})


def write_adapter(folder: Path, state: Mapping[str, Tensor], config: peft.PeftConfig, task: str | None) -> None:
    """Write adapters in PEFT's format, for a model of the PEFT task type `task`; their base is the folder above."""
    folder.mkdir()
    config.task_type = None if task is None else peft.TaskType(task)
    config.base_model_name_or_path = ".."
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_adapter_file(folder, state)


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the precision in which it is stored: `dtype`, or its own if it holds whole numbers."""
    return value.to(dtype) if value.is_floating_point() else value


def _plain(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    kept = name.rpartition(".")[2] in SCALE_PARTS
    return (value.detach() if kept else stored(value.detach(), dtype)).cpu().contiguous()


def _without_adapters(block: nn.Module) -> dict[str, Tensor]:
    """The tensors of a block under the names that they have without the adapters on it."""
    carriers = [name for name, module in block.named_modules() if isinstance(module, BaseTunerLayer)]
    tensors = {}
    for name, value in block.state_dict().items():
        carrier = next((each for each in carriers if name.startswith(f"{each}.")), None)
        if carrier is None:
            tensors[name] = value
        elif name.startswith(f"{carrier}.base_layer."):
            tensors[name.replace(".base_layer", "", 1)] = value
    return tensors
