"""The transformers quantizer `apiq`: `from_pretrained` on a checkpoint folder gives a packed model, or a refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from apiq.blocks.architecture import replace
from apiq.checkpoint import manifest
from apiq.errors import ApiqError
from apiq.grids.affine import Grid
from apiq.layers.packed import PackedLinear


class ApiqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: its grid, and which linears are packed."""

    def __init__(self, bits: int, group_size: int, symmetric: bool, blocks: str, linears: list[str], **_: Any):
        self.quant_method = "apiq"  # type: ignore[assignment]
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.blocks, self.linears = blocks, linears

    @property
    def grid(self) -> Grid:
        """The grid of every packed linear."""
        return Grid(self.bits, self.group_size, self.symmetric)

    def place(self, name: str) -> str:
        """`name` from the list of blocks on: models with and without a head carry different prefixes."""
        found = re.search(rf"(?:^|\.)({re.escape(self.blocks.rpartition('.')[2])}\.\d+\..*)", name)
        return found.group(1) if found else name

    def matches(self, name: str) -> bool:
        """Whether the module `name` is packed."""
        return self.place(name).split(".", 2)[-1] in self.linears


class ApiqQuantizer(HfQuantizer):
    """Puts PackedLinear where the checkpoint has codes; refuses a folder that is not whole."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        files = kwargs.get("checkpoint_files") or []
        if not files:
            raise ApiqError("an apiq model can only be loaded from a checkpoint folder with its weights.")
        manifest.verify(Path(files[0]).parent)
        config = self.quantization_config
        assert isinstance(config, ApiqConfig)
        pack_linears(model, config, kwargs.get("dtype") or torch.get_default_dtype())
        _refuse_missing(model, config, [Path(file) for file in files])
        return model

    def is_serializable(self) -> bool:  # type: ignore[override]
        """A packed model can be saved with save_pretrained."""
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Adapters on it can be trained."""
        return True


def pack_linears(model: nn.Module, config: ApiqConfig, dtype: torch.dtype) -> None:
    """Replace the linears that `config` names by empty packed ones, on the device of the model."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and config.matches(name)]
    if not names:
        raise ApiqError(
            f"config.json names packed linears {config.blocks}.N.{config.linears[0]}, "
            f"of which {type(model).__name__} has none."
        )
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device(linear.weight.device):
            packed = PackedLinear(linear.in_features, linear.out_features, config.grid, linear.bias is not None, dtype)
        replace(model, name, packed)


def _refuse_missing(model: nn.Module, config: ApiqConfig, files: list[Path]) -> None:
    """Refuse a checkpoint that lacks a tensor of a packed linear: transformers would only warn and make it up."""
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored.update(config.place(key) for key in tensors.keys())  # noqa: SIM118 (not a mapping)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            missing = [key for key in module.state_dict() if config.place(f"{name}.{key}") not in stored]
            if missing:
                raise ApiqError(f"the checkpoint has no tensor {name}.{missing[0]}; make it again.")


# As calls, not as decorators: those would hide the classes from type checkers
register_quantization_config("apiq")(ApiqConfig)
register_quantizer("apiq")(ApiqQuantizer)
