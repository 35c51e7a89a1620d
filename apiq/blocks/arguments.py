"""The arguments of a block besides its hidden states, for any batch of the calibration windows.

What a model hands to its blocks depends on the number of windows in many ways: one mask for all or one for each, ALiBi
with a row for each head of each window. Calls with one window and with two tell which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apiq.errors import ApiqError


@dataclass(frozen=True)
class PerWindow:
    """An argument that differs between the windows, such as a padding mask; shape (windows, rows of each, ...)."""

    values: Tensor


@dataclass(frozen=True)
class Repeated:
    """An argument with the same rows for every window; shape (rows of each, ...)."""

    values: Tensor


@dataclass
class BlockCall:
    """The arguments of a block besides the hidden states: as they are for every batch, Repeated or PerWindow."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def given(self, batch: slice, count: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the `count` windows of `batch`."""

        def chosen(value: Any) -> Any:
            if isinstance(value, PerWindow):
                return value.values[batch].flatten(0, 1).to(device)
            if isinstance(value, Repeated):
                rows, rest = value.values, [-1] * (value.values.dim() - 1)
                return rows.expand(count, *rest) if len(rows) == 1 else rows.repeat(count, *(1 for _ in rest))
            return value

        return each(self.args, chosen), each(self.kwargs, chosen)

    def run(self, block: nn.Module, hidden: Tensor, batch: slice) -> Tensor:
        """The hidden states (batch, length, width) that `block` makes of `hidden`, the windows of `batch`."""
        args, kwargs = self.given(batch, len(hidden), hidden.device)
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def moved(self, device: torch.device, known: dict[int, Tensor]) -> BlockCall:
        """The call on a device, but for what is PerWindow; tensors of `known`, by id, are not moved again."""

        def move(value: Any) -> Any:
            if isinstance(value, Repeated):
                return Repeated(move(value.values))
            if not isinstance(value, Tensor):
                return value
            if id(value) not in known:
                known[id(value)] = value.to(device)
            return known[id(value)]

        return BlockCall(each(self.args, move), each(self.kwargs, move))


def varies(single: Any, pair: Any) -> bool:
    """Whether an argument differs between the two windows of `pair`; in `single` it is that of one window."""
    if isinstance(single, Tensor):
        return _grows(single, pair) and not torch.equal(*pair.chunk(2))
    if isinstance(single, tuple | list):
        return any(varies(*items) for items in zip(single, pair, strict=True))
    if isinstance(single, dict):
        return any(varies(value, pair[key]) for key, value in single.items())
    return False


def joined(single: Any, pairs: Sequence[Any], known: dict[int, Any]) -> Any:
    """The arguments for all windows: from a call with one, and for each window a call with it and another.

    An argument that many blocks share, known by its id in `known`, is joined once.
    """
    first = pairs[0]
    if isinstance(first, Tensor):
        if id(first) not in known:
            known[id(first)] = _joined(single, pairs)
        return known[id(first)]
    if isinstance(first, tuple | list):
        return type(first)(joined(single[i], [pair[i] for pair in pairs], known) for i in range(len(first)))
    if isinstance(first, dict):
        return {key: joined(single[key], [pair[key] for pair in pairs], known) for key in first}
    return first


def _joined(single: Tensor, pairs: Sequence[Tensor]) -> Any:
    if not _grows(single, pairs[0]):
        return single
    own = [pair[: len(single)] for pair in pairs]
    if all(torch.equal(rows, own[0]) for rows in own[1:]):
        return Repeated(own[0].clone())
    return PerWindow(torch.stack(own))


def _grows(single: Tensor, pair: Tensor) -> bool:
    """Whether an argument has rows for each window.

    Raises:
        ApiqError: it depends on the number of windows in another way.
    """
    if single.shape == pair.shape:
        return False
    if pair.dim() and pair.shape[0] == 2 * single.shape[0] and pair.shape[1:] == single.shape[1:]:
        return True
    raise ApiqError(
        f"the model hands its blocks an argument of shape {tuple(single.shape)} for one window and of "
        f"{tuple(pair.shape)} for two; how that goes on is not known, so it cannot be quantized block by block."
    )


def each(value: Any, change: Any) -> Any:
    """`value` with `change` done to everything in its tuples, lists and mappings."""
    if isinstance(value, tuple | list):
        return type(value)(each(item, change) for item in value)
    if isinstance(value, dict):
        return {key: each(item, change) for key, item in value.items()}
    return change(value)
