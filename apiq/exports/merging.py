"""Adapters added to dequantized weights, by PEFT's own merge, one linear at a time."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from apiq.adapters.injection import IN_BLOCK, SHARED
from apiq.blocks.unfuse import linear_of
from apiq.checkpoint.adapter_file import read_adapter
from apiq.errors import ApiqError
from apiq.exports.shards import cast, write_folder
from apiq.exports.source import Linear, Source


class Merger:
    """The adapters of a folder, ready to be added to weights."""

    def __init__(self, adapter: Path):
        import apiq.adapters.houlsby  # noqa: F401 (registers the adapter that PEFT lacks)

        self.folder = adapter
        self.config = peft.PeftConfig.from_pretrained(str(adapter))
        self.config.task_type = None  # it acts on linears here, whatever the model is for

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the adapters by PEFT's names."""
        return read_adapter(self.folder)

    @torch.no_grad()
    def adapted(self, linears: list[Linear]) -> Any:
        """The linears of a block, dense and float32, with their adapters: PEFT's model, or None without adapters there.

        Raises:
            ApiqError: PEFT does not know one of their tensors.
        """
        own = {key: value for key, value in self.state.items() if _shared(key) or _within(key, linears)}
        if all(_shared(key) for key in own):
            return None
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # PEFT speaks of whole models
            warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
            adapted = peft.get_peft_model(_tree(linears), self.config)
            unknown = peft.set_peft_model_state_dict(adapted, own).unexpected_keys
        if unknown:
            raise ApiqError(f"PEFT does not know the adapter tensor {unknown[0]} of {self.folder}.")
        return adapted

    @torch.no_grad()
    def merged(self, linears: list[Linear]) -> dict[str, Tensor]:
        """Weights and biases of the linears of a block with what the adapters change in them, float32, by name.

        Raises:
            ApiqError: the adapters are no change of weights.
        """
        adapted = self.adapted(linears)
        if adapted is None:
            return _tree(linears).state_dict()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return adapted.merge_and_unload(safe_merge=True).state_dict()
        except (NotImplementedError, AttributeError) as error:
            raise ApiqError(
                f"adapters of type {self.config.peft_type} are no change of the weight and cannot be merged "
                f"({type(error).__name__}); keep them beside the model with apiq export --format dense."
            ) from None

    def refuse_strays(self, source: Source) -> None:
        """Refuse adapters that are not on packed linears, which the merge would lose.

        Raises:
            ApiqError: there is such a tensor.
        """
        for key in self.state:
            if not _shared(key) and not any(key.startswith(f"{IN_BLOCK}{name}.") for name in source.shapes):
                name = key.removeprefix(IN_BLOCK)
                raise ApiqError(
                    f"{self.folder} trains {name}, which is no packed linear and cannot be merged; keep the adapter "
                    "beside the model with apiq export --format dense."
                )


def write_merged(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Write Q with the adapter added, computed in float32 and rounded once to `dtype`.

    Raises:
        ApiqError: there is no adapter, it cannot be merged, a linear is part of a fused tensor, or a number is too
            large for `dtype`.
    """
    merger = merger_of(source)
    transposed = {f"{name}.weight" for name in source.transposed}

    def tensors(linears: list[Linear]) -> dict[str, Tensor]:
        merged = merger.merged(linears)
        return {name: cast(each.t() if name in transposed else each, dtype, name) for name, each in merged.items()}

    write_folder(source, folder, tensors, dtype)


def merger_of(source: Source) -> Merger:
    """The adapters of `source`, all of which are on packed linears.

    Raises:
        ApiqError: there are none, or one is elsewhere.
    """
    if source.adapter is None:
        raise ApiqError(f"{source.folder} has no adapters to merge; use apiq export --format dense.")
    merger = Merger(source.adapter)
    merger.refuse_strays(source)
    return merger


def _shared(key: str) -> bool:
    return key.startswith(SHARED) and not key.startswith(IN_BLOCK)


def _within(key: str, linears: list[Linear]) -> bool:
    return any(key.startswith(f"{IN_BLOCK}{linear.name}.") for linear in linears)


def _tree(linears: list[Linear]) -> nn.Module:
    """Modules inside each other with the dequantized linears at their names."""
    root = nn.Module()
    for linear in linears:
        *parents, last = linear.name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        bias = None if linear.bias is None else linear.bias.float()
        module.add_module(last, linear_of(linear.dequantized(), bias))
    return root
