"""A cache of keys and values with room for a known length, so that a token more does not copy all before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def roomy_cache(model: Any, length: int) -> DynamicCache:
    """An empty cache for `length` tokens; layers of other kinds than plain attention stay those of transformers."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Roomy(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Roomy(DynamicLayer):
    """Keys and values (batch, heads, tokens, width) as views of tensors with room for `length` tokens."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to both, and give them as they are then."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = tuple(
                new.new_empty(*new.shape[:2], self.length, new.shape[3]) for new in (key_states, value_states)
            )
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values
