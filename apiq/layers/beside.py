"""The plain LoRA of a linear, computed with the product of its fake-quantized weight.

PEFT casts X to the precision of A, multiplies, scales and adds in five more passes over X and Y. Here c (X A^T) B^T is
added by the product itself, and all linears of a block make their Q in the same memory, one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from peft.tuners import lora
from torch import Tensor, nn

from apiq.layers.fake_quant import FakeQuantLinear
from apiq.layers.lora import exchanged, low_rank, plain_lora
from apiq.layers.product import autocast_is_on


@contextlib.contextmanager
def beside(block: nn.Module, fakes: Sequence[FakeQuantLinear]) -> Iterator[None]:
    """Within it the FakeQuantLinears of `block` compute the plain LoRA on them and share the room for Q."""
    room = _Room(fakes)
    hook = block.register_forward_pre_hook(lambda *_: room.lend())
    try:
        with exchanged(plain_lora(block), _Beside):
            yield
    finally:
        hook.remove()
        for fake in fakes:
            fake.room = None


class _Room:
    """Memory for the largest Q of a block, on a CPU: a GPU's allocator keeps what was freed."""

    def __init__(self, fakes: Sequence[FakeQuantLinear]):
        self.fakes = fakes
        self.elements = max((fake.full_weight.numel() for fake in fakes), default=0)
        self.vector: Tensor | None = None

    def lend(self) -> None:
        """Give it to all, in the precision that is computed in now."""
        for fake in self.fakes:
            kind = fake.full_weight.device.type
            if kind != "cpu":
                return
            dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else fake.full_weight.dtype
            if self.vector is None or self.vector.dtype != dtype:
                self.vector = torch.empty(self.elements, dtype=dtype)
            fake.room = self.vector


class _Beside(nn.Module):
    """Stands in for PEFT's LoRA layer."""

    def __init__(self, layer: lora.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        """X Q^T + c (X A^T) B^T + bias, (..., out), for X (..., in)."""
        return self.layer.get_base_layer()(input, low_rank(self.layer))
