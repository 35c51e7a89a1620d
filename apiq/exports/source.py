"""What is exported: a quantized folder and its adapters, one weight file at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apiq.blocks.stream import skeleton
from apiq.checkpoint import manifest
from apiq.checkpoint.base import base_of
from apiq.checkpoint.grid_config import grid_for
from apiq.checkpoint.layout import INDEX
from apiq.errors import ApiqError
from apiq.files import read_json
from apiq.grids.affine import Grid
from apiq.layers.packed import PackedLinear
from apiq.models.config import read_config


@dataclass(frozen=True)
class Linear:
    """A packed linear taken apart."""

    name: str
    """Name in the model, as in `model.layers.0.mlp.up_proj`."""
    packed: PackedLinear
    bias: Tensor | None
    """(out), which is one of the other tensors of the file too."""

    @property
    def grid(self) -> Grid:
        """Its grid."""
        return self.packed.grid

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) uint8, scales (out, G) float32, zero points (out, G) float32."""
        return self.packed.unpacked()

    def dequantized(self) -> Tensor:
        """Q (out, in), float32."""
        return self.packed.dequantized()


@dataclass(frozen=True)
class Source:
    """A verified quantized folder."""

    folder: Path
    adapter: Path | None
    """The adapter folder that belongs to it: its own, or the one that was trained on it."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.folder / "config.json")

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """The configuration of the model without that of its quantization."""
        config = read_config(self.folder)
        delattr(config, "quantization_config")
        return config

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grid of each packed linear by name."""
        config = self.config["quantization_config"]
        return {name: grid_for(config, name.removeprefix(f"{config['blocks']}.")) for name in self.shapes}

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of the index of the weight files."""
        return read_json(self.folder / INDEX)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each packed linear by name."""
        return {name: (shape[0], shape[1]) for name, shape in self.index["metadata"]["shapes"].items()}

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what is not packed."""
        return getattr(torch, self.config["dtype"])

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model as transformers makes it, without its weights."""
        return skeleton(self.model_config, torch.float32)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the model in transformers by name, on the meta device."""
        return dict(self.model.named_modules())

    @cached_property
    def transposed(self) -> set[str]:
        """The packed linears whose weight transformers keeps as (in, out): GPT-2's Conv1D.

        Raises:
            ApiqError: a packed linear is no module of the model in transformers, but part of a fused tensor.
        """
        for name in self.shapes:
            if not isinstance(self.modules.get(name), nn.Linear | Conv1D):
                raise ApiqError(
                    f"{name} is part of a fused tensor in {self.family} models of transformers (a mixture of experts), "
                    "whose linears no format for other programs can name yet; keep the model in the format of apiq."
                )
        return {name for name in self.shapes if isinstance(self.modules[name], Conv1D)}

    @property
    def family(self) -> str:
        """The name of the architecture, as in `Llama`."""
        return type(self.model_config).__name__.removesuffix("Config")

    def unpacked_linears(self) -> list[str]:
        """The linears of the model that are stored as they were, as the head.

        Raises:
            ApiqError: a packed linear is no linear of the model in transformers, but Conv1D, or part of a fused tensor.
        """
        if self.transposed:
            raise ApiqError(
                f"{min(self.transposed)} is a Conv1D in {self.family} models of transformers, which engines do not "
                "read in few bits; export with --format dense, or merge the adapter with apiq merge."
            )
        linears = [name for name, module in self.modules.items() if isinstance(module, nn.Linear)]
        return [name for name in linears if name not in self.shapes]

    def files(self) -> Iterator[tuple[str, dict[str, Tensor], list[Linear]]]:
        """Each weight file: its name, its tensors in the precision in which they are, its packed linears."""
        for file in sorted(set(self.index["weight_map"].values())):
            with safe_open(self.folder / file, framework="pt") as tensors:
                held = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
            linears = [self._linear(name, held) for name in self.shapes if f"{name}.codes" in held]
            yield file, held, linears

    def _linear(self, name: str, held: dict[str, Tensor]) -> Linear:
        out_features, in_features = self.shapes[name]
        packed = PackedLinear(in_features, out_features, self.grids[name], False, torch.float32)
        for part in dict(packed.named_buffers()):
            setattr(packed, part, held.pop(f"{name}.{part}"))
        return Linear(name, packed, held.get(f"{name}.bias"))


def open_source(folder: str | Path) -> Source:
    """The quantized folder `folder`, or the one below the finetuned adapters in it, with those adapters.

    Raises:
        ApiqError: it is no whole folder of either kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ApiqError(f"there is no folder {folder}.")
    facts = manifest.verify(folder)
    base = folder
    if facts["kind"] == "finetuned":
        base = base_of(folder, facts)
    if base != folder:
        manifest.verify(base)
    if (kind := (manifest.read(base) or facts)["kind"]) != "quantized":
        raise ApiqError(f"{base} is a folder of kind {kind}; a quantized or a finetuned one is needed here.")
    adapter = folder / "adapter"
    return Source(base, adapter if adapter.is_dir() else None)
