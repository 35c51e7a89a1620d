"""A small packed model with dense weights: Q is held, and plain LoRA is folded into it.

    Y = X (Q + c B A)^T + bias    instead of    Y = X Q^T + c (X A^T) B^T + bias,    c = alpha / r

In a small model the time goes into the number of operations, and a dense copy costs no memory to speak of. It is the
same function of A and B, and PEFT's modules keep them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.layers.lora import is_plain
from apiq.layers.packed import PackedLinear
from apiq.layers.product import autocast_is_on

LIMIT = 2**24
"""Weights of a model that is small: 64 MB in float32."""


@contextlib.contextmanager
def dense(model: nn.Module, trained: bool = True) -> Iterator[None]:
    """Within it, a model with at most LIMIT packed weights, computed in float32, uses dense ones.

    Without `trained` A and B are taken to stay as they are.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    total = sum(module.in_features * module.out_features for module in packed)
    if not packed or total > LIMIT or any(module.compute_dtype != torch.float32 for module in packed):
        yield
        return
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, lora.Linear) and isinstance(child.get_base_layer(), PackedLinear) and is_plain(child)
    ]
    try:
        for module in packed:
            module.held = module.dequantized()
        for parent, name, child in places:
            setattr(parent, name, _Folded(child, trained))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
        for module in packed:
            module.held = None


class _Folded(nn.Module):
    """Stands in for PEFT's LoRA layer and computes with Q + c B A."""

    def __init__(self, layer: lora.Linear, trained: bool):
        super().__init__()
        self.layer = layer
        self.fixed = None if trained else self._weight().detach()

    def forward(self, input: Tensor) -> Tensor:
        """X (Q + c B A)^T + bias, (..., out), for X (..., in)."""
        if autocast_is_on(input.device.type):
            return self.layer(input)
        weight = self._weight() if self.fixed is None else self.fixed
        return F.linear(input, weight, self.layer.get_base_layer().bias)  # type: ignore[arg-type]

    def _weight(self) -> Tensor:
        layer = self.layer
        name = layer.active_adapters[0]
        base = layer.get_base_layer()
        assert isinstance(base, PackedLinear) and base.held is not None
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        return torch.addmm(base.held, B, A, alpha=layer.scaling[name])  # type: ignore[arg-type]
