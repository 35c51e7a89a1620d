"""What the model hands to each of its blocks: the first hidden states and every block's own arguments.

One forward of the model in which each block only records its arguments and passes the hidden states
on: masks, rotary embeddings and sliding windows come from the model's own code, whatever its family,
and no block is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apiq.blocks.activations import Activations, batches, home_of


@dataclass
class BlockCall:
    """The arguments of a block besides the hidden states, for one window (they broadcast over a batch)."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states (batch, length, width) that `block` makes of `hidden`."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, windows: Tensor, device: torch.device, dtype: torch.dtype, copies: int
) -> tuple[Activations, list[BlockCall]]:
    """The input X of the first block for all `windows` (n, length), and the call of every block.

    `copies` is how many such X the caller is going to hold at a time; it decides where they live.
    Only what lies outside the blocks is computed, where the model is; results go to `device`.
    """
    base = model.base_model if isinstance(model.base_model, nn.Module) else model
    place = next(p.device for name, p in base.named_parameters() if p.device.type != "meta")
    with _recording(blocks) as calls:
        _forward(base, windows[:1].to(place))
        recorded = [
            BlockCall(_move(args[1:], device), _move(_without_hidden(kwargs), device)) for args, kwargs in calls
        ]
        hidden = _hidden(*calls[0])
        shape = (len(windows), *hidden.shape[1:])
        X = Activations.empty(shape, dtype, device, home_of(shape, dtype, copies, device))
        for batch in batches(len(windows), 16):
            calls.clear()
            _forward(base, windows[batch].to(place))
            X[batch] = _hidden(*calls[0])
    return X, recorded


def _forward(base: nn.Module, input_ids: Tensor) -> None:
    base(input_ids=input_ids, use_cache=False)


@contextlib.contextmanager
def _recording(blocks: nn.ModuleList) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return _hidden(args, kwargs)

    try:
        for block in blocks:
            block.forward = record
        yield calls
    finally:
        for block in blocks:
            del block.forward


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _without_hidden(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("hidden_states", "past_key_values")}


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_move(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    return value
