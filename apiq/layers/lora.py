"""PEFT's LoRA layers that are nothing but their base and one c B A, and what may stand in for them for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from peft.tuners import lora
from torch import nn

from apiq.layers.fake_quant import FakeQuantLinear
from apiq.layers.product import LowRank

Place = tuple[nn.Module, str, lora.Linear]
"""A LoRA layer with its parent and its name there."""


def plain_lora(block: nn.Module) -> list[Place]:
    """The plain LoRA layers on FakeQuantLinears of `block`."""
    return [
        (parent, name, child)
        for parent in block.modules()
        for name, child in parent.named_children()
        if isinstance(child, lora.Linear) and isinstance(child.get_base_layer(), FakeQuantLinear) and is_plain(child)
    ]


@contextlib.contextmanager
def exchanged(places: list[Place], make: Callable[[lora.Linear], nn.Module]) -> Iterator[None]:
    """Within it what `make` gives stands in the place of each layer."""
    try:
        for parent, name, child in places:
            setattr(parent, name, make(child))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def low_rank(layer: lora.Linear) -> LowRank:
    """A, B and c of a plain layer."""
    name = layer.active_adapters[0]
    return LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])  # type: ignore[arg-type]


def is_plain(layer: lora.Linear) -> bool:
    """Whether the layer is its base plus one A B^T, without dropout, bias or a variant such as DoRA."""
    if len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (
        not layer.merged
        and not layer.disable_adapters
        and not layer.fan_in_fan_out
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )
