"""Where the transformer blocks of a model and their linears are, found from the model itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from apiq.errors import ApiqError

KEPT = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
"""Linears that choose between experts: a few thousand weights on which everything hangs, kept as they are."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model and the name of the list that holds them, as in `model.layers`."""

    path: str
    modules: nn.ModuleList


def text_model(model: nn.Module) -> nn.Module:
    """The part of a transformers model that makes hidden states of tokens, without heads and other modalities."""
    config = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        return model.get_decoder()  # type: ignore[operator]
    return model.base_model if isinstance(getattr(model, "base_model", None), nn.Module) else model  # type: ignore[return-value]


def find_blocks(model: nn.Module) -> Blocks:
    """The nn.ModuleList of modules of one class, in the text part of the model, that holds the most weights.

    Raises:
        ApiqError: no such list is there.
    """
    text = text_model(model)
    outer = next((name for name, module in model.named_modules() if module is text), "")
    lists = {
        f"{outer}.{name}".strip("."): module
        for name, module in text.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
    }
    sizes = {name: sum(p.numel() for p in module.parameters() if p.dim() > 1) for name, module in lists.items()}
    path = max(sizes, key=lambda name: sizes[name], default="")
    if not path or not sizes[path]:
        raise ApiqError(
            f"no transformer blocks were found in {type(model).__name__}: looked in {type(text).__name__} for an "
            f"nn.ModuleList of modules of one class with weights, found the lists {', '.join(lists) or 'none'}."
        )
    return Blocks(path, lists[path])


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block that are quantized, by their name inside it, as in `self_attn.q_proj`."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not KEPT.search(name)}


def replace(block: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Put `module` where the submodule (or parameter) `name` of `block` was."""
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)
