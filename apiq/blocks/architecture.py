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
    """The nn.ModuleList in the text part of the model, inside no other, that holds the most weights.

    Raises:
        ApiqError: no such list is there, its modules are not of one class, or the model has an encoder and a decoder.
    """
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ApiqError(
            f"{kind} has an encoder and a decoder, of which apiq would quantize one alone; take a model that is either."
        )
    text = text_model(model)
    outer = next((name for name, module in model.named_modules() if module is text), "")
    lists: dict[str, nn.ModuleList] = {}
    for name, module in text.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{known}.") for known in lists):
            lists[name] = module
    sizes = {name: sum(p.numel() for p in module.parameters() if p.dim() > 1) for name, module in lists.items()}
    path = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(path):
        raise ApiqError(
            f"no transformer blocks were found in {kind}: looked in {type(text).__name__} for an nn.ModuleList with "
            f"weights, found the lists {', '.join(lists) or 'none'}."
        )
    classes = dict.fromkeys(type(module).__name__ for module in lists[path])
    if len(classes) > 1:
        raise ApiqError(
            f"the blocks of {kind} in {path} are of several classes, {', '.join(classes)}; such a model cannot be "
            "quantized block by block."
        )
    return Blocks(f"{outer}.{path}".strip("."), lists[path])


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block that are quantized, by their name inside it, as in `self_attn.q_proj`."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not KEPT.search(name)}


def replace(block: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Put `module` where the submodule (or parameter) `name` of `block` was."""
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)
