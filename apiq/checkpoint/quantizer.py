"""The transformers quantizer `apiq`: `from_pretrained` on a checkpoint folder gives a packed model, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from apiq.blocks.architecture import find_blocks, linears, replace
from apiq.blocks.unfuse import unfuse
from apiq.checkpoint import manifest
from apiq.checkpoint.fetching import complete
from apiq.checkpoint.grid_config import grid_for, grid_of
from apiq.errors import ApiqError
from apiq.grids.affine import Grid
from apiq.layers.packed import PackedLinear


class ApiqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: its grid, which linears are packed, and which have other grids."""

    def __init__(
        self,
        bits: float,
        group_size: int,
        symmetric: bool | Literal["balanced"],
        blocks: str,
        linears: list[str],
        levels: str = "uniform",
        double_quantization: bool = False,
        offsets: bool = False,
        exceptions: dict[str, dict[str, Any]] | None = None,
        **_: Any,
    ):
        self.quant_method = "apiq"  # type: ignore[assignment]
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.levels, self.double_quantization, self.offsets = levels, double_quantization, offsets
        self.blocks, self.linears, self.exceptions = blocks, linears, exceptions or {}

    @property
    def grid(self) -> Grid:
        """The grid of every packed linear but the exceptions."""
        return grid_of(vars(self))

    def grid_for(self, name: str) -> Grid:
        """The grid of the packed linear `name`, as in `3.mlp.down_proj`."""
        return grid_for(vars(self), name)


class ApiqQuantizer(HfQuantizer):
    """Puts PackedLinear where the checkpoint has codes; refuses a folder that is not whole."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        files = kwargs.get("checkpoint_files") or []
        if not files:
            raise ApiqError("an apiq model can only be loaded from a checkpoint folder with its weights.")
        complete(Path(files[0]).parent)
        manifest.verify(Path(files[0]).parent)
        config = self.quantization_config
        assert isinstance(config, ApiqConfig)
        path = pack_linears(model, config, kwargs.get("dtype") or torch.get_default_dtype())
        _refuse_missing(model, path, config, [Path(file) for file in files])
        return model

    def is_serializable(self) -> bool:  # type: ignore[override]
        """A packed model cannot be saved with save_pretrained, which knows nothing of apiq.json."""
        logging.get_logger("transformers.apiq").warning(
            "a model in the format of apiq is not written by save_pretrained; copy the folder that it was loaded from, "
            "or write its weights in full with apiq export --format dense."
        )
        return False

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Adapters on it can be trained."""
        return True


def pack_linears(model: nn.Module, config: ApiqConfig, dtype: torch.dtype) -> str:
    """Replace the linears that `config` names by empty packed ones, on the device of the model.

    Returns:
        The name of the list of blocks in `model`; models with and without a head differ in it.
    """
    blocks, packed = find_blocks(model), 0
    for index, block in enumerate(blocks.modules):
        for name, linear in linears(unfuse(block)).items():
            if name in config.linears:
                grid = config.grid_for(f"{index}.{name}")
                with torch.device(linear.weight.device):
                    new = PackedLinear(linear.in_features, linear.out_features, grid, linear.bias is not None, dtype)
                replace(block, name, new)
                packed += 1
    if not packed:
        raise ApiqError(
            f"config.json names packed linears {config.blocks}.N.{config.linears[0]}, "
            f"of which {type(model).__name__} has none."
        )
    return blocks.path


def _refuse_missing(model: nn.Module, path: str, config: ApiqConfig, files: list[Path]) -> None:
    """Refuse a checkpoint in which a packed linear lacks a tensor or has one of another shape.

    transformers would only warn of the one and make it up, and give a table of the other.
    """
    stored: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                stored[key.removeprefix(f"{config.blocks}.")] = tensors.get_slice(key).get_shape()
    for name, module in model.get_submodule(path).named_modules():
        for key, value in module.state_dict().items() if isinstance(module, PackedLinear) else ():
            shape, place = stored.get(f"{name}.{key}"), f"{path}.{name}.{key}"
            if shape is None:
                raise ApiqError(f"the checkpoint has no tensor {place}; make it again.")
            if shape != list(value.shape):
                raise ApiqError(
                    f"the tensor {place} has shape {shape}, not {list(value.shape)}; make the folder again."
                )


# As calls, not as decorators: those would hide the classes from type checkers
register_quantization_config("apiq")(ApiqConfig)
register_quantizer("apiq")(ApiqQuantizer)
