"""The last hidden states of a model, which its head makes predictions of: a second thing to preserve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from apiq.adapters.unwrapped import unwrapped
from apiq.errors import ApiqError


def head_of(model: Any) -> nn.Module:
    """The module that makes logits of hidden states, in a model with adapters or without.

    Raises:
        ApiqError: the model does not say which of its modules is the head.
    """
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ApiqError(
            f"{type(base).__name__} does not name its head, so its last hidden states are not known: "
            "set refine.hidden_weight to 0."
        )
    return head


@contextlib.contextmanager
def hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Within it, the list has what the head of `model` was given last, (batch, length, width), and nothing else.

    Raises:
        ApiqError: see `head_of`.
    """
    seen: list[Tensor] = []
    handle = head_of(model).register_forward_pre_hook(lambda _, given: seen.__setitem__(slice(None), given[:1]))
    try:
        yield seen
    finally:
        handle.remove()


def distance(hidden: Tensor, target: Tensor, power: float) -> Tensor:
    """The mean square of hidden - target, computed in float32, relative to `power`, the mean square of all targets."""
    return (hidden.float() - target.float()).square().mean() / power
