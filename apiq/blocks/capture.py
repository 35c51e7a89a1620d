"""What the model hands to each of its blocks: the first hidden states and every block's own arguments.

One forward of the model in which each block only records its arguments and passes the hidden states
on: masks, rotary embeddings and sliding windows come from the model's own code, whatever its family,
and no block is computed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apiq.blocks.activations import Activations, Home, batches
from apiq.blocks.architecture import text_model
from apiq.blocks.arguments import BlockCall, joined, varies
from apiq.errors import ApiqError

PADDING = -100
"""What stands in a calibration window where there is no token."""


@torch.no_grad()
def capture(
    model: nn.Module,
    blocks: nn.ModuleList,
    windows: Tensor,
    dtype: torch.dtype,
    home_of: Callable[[tuple[int, ...]], Home],
) -> tuple[Activations, list[BlockCall]]:
    """The input X of the first block for all `windows` (n, length), and the call of every block.

    A window may be padded with PADDING. `home_of` tells where an X of a shape is to live. Only what
    lies outside the blocks is computed, where the model is; the calls go to the device of the home.

    Raises:
        ApiqError: the model does something to the hidden states between two blocks.
    """
    base = text_model(model)
    place = next(p.device for p in base.parameters() if p.device.type != "meta")
    recorder = _Recorder(base, blocks, place, padded=bool((windows == PADDING).any()))
    hidden, calls = recorder.calls(windows)
    shape = (len(windows), *hidden.shape[1:])
    X = Activations.empty(shape, dtype, home_of(shape))
    known: dict[int, Tensor] = {}
    moved = [BlockCall(*call).moved(X.device, known) for call in calls]
    for batch in batches(len(windows), 16):
        X[batch] = _hidden(*recorder.forward(windows[batch])[0])
    return X, moved


def completed(model: nn.Module, blocks: nn.ModuleList, windows: Tensor, hidden: Tensor) -> Tensor:
    """The logits (n, length, vocabulary) that `model` makes of `hidden`, what its last block gave for `windows`."""
    failures = (ApiqError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)
    try:
        return _completed(model, blocks, windows, hidden)
    except torch.OutOfMemoryError:
        raise
    except failures as failure:
        try:
            return _completed(model, blocks, windows, (hidden, None))
        except failures:
            raise failure from None


def _completed(model: nn.Module, blocks: nn.ModuleList, windows: Tensor, output: Any) -> Tensor:
    try:
        for block in blocks:
            block.forward = lambda *_, **__: output
        logits = model(input_ids=windows, use_cache=False, **_without_routers(model)).logits
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    if logits.shape[:2] != windows.shape:  # what should have been in a tuple was taken for one
        raise ValueError(f"{tuple(logits.shape)} are no logits for windows {tuple(windows.shape)}")
    return logits


def _without_routers(model: nn.Module) -> dict[str, bool]:
    """No loss of the routers of a mixture of experts, which its config.json may ask for: the blocks do not run here."""
    config: Any = model.config
    return {"output_router_logits": False} if getattr(config.get_text_config(), "output_router_logits", False) else {}


def counted(windows: Tensor) -> Tensor | None:
    """Which positions (n, length) of `windows` hold a token; None where all of them do."""
    mask = windows != PADDING
    return None if bool(mask.all()) else mask


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Recorder:
    """Runs the model around its blocks, which only record what they are called with."""

    base: nn.Module
    blocks: nn.ModuleList
    place: torch.device
    padded: bool
    as_tuple: bool = False

    def calls(self, windows: Tensor) -> tuple[Tensor, list[Any]]:
        """The hidden states of the first window, and what each block is called with besides them."""
        first = self._first(windows[:1])
        # beside the emptiest no window is without a mask, and beside another one it shows what is its own
        differing = (row for row in windows if not torch.equal(row, windows[0]))
        other = windows[(windows == PADDING).sum(-1).argmax()] if self.padded else next(differing, windows[0])
        single = [_without_hidden(call) for call in self.forward(other[None])]
        pairs = [self._pair(windows[0], other)]
        if self.padded or varies(single, pairs[0]):
            pairs += [self._pair(row, other) for row in windows[1:]]
        return _hidden(*first[0]), joined(single, pairs, {})

    def _pair(self, window: Tensor, other: Tensor) -> list[Call]:
        return [_without_hidden(call) for call in self.forward(torch.stack([window, other]))]

    def _first(self, window: Tensor) -> list[Call]:
        failures = (ApiqError, TypeError, ValueError, AttributeError, IndexError)
        try:
            return self._forward_of_states(window)
        except failures as failure:
            self.as_tuple = True  # as the blocks of some families return
            try:
                return self._forward_of_states(window)
            except failures:
                if isinstance(failure, ApiqError):
                    raise failure from None
                raise ApiqError(
                    f"{type(self.base).__name__} cannot be run around its {type(self.blocks[0]).__name__} blocks "
                    f"({failure}); such a model cannot be quantized block by block."
                ) from None

    def _forward_of_states(self, window: Tensor) -> list[Call]:
        calls = self.forward(window)
        shape = tuple(_hidden(*calls[0]).shape)
        if shape[:-1] != tuple(window.shape):
            raise ApiqError(
                f"the blocks of {type(self.base).__name__} take hidden states of shape {shape} for windows "
                f"{tuple(window.shape)}, not one vector a token; such a model cannot be quantized block by block."
            )
        return calls

    def forward(self, windows: Tensor) -> list[Call]:
        """What each block is called with for `windows`."""
        windows = windows.to(self.place)
        extra: dict[str, Any] = {"attention_mask": (windows != PADDING).long()} if self.padded else {}
        accepted = inspect.signature(self.base.forward).parameters
        if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            extra["use_cache"] = False
        filler = getattr(self.base.config, "pad_token_id", None) or 0
        with self._recording() as calls:
            self.base(input_ids=windows.masked_fill(windows == PADDING, filler), **extra)
        return calls

    @contextlib.contextmanager
    def _recording(self) -> Iterator[list[Call]]:
        calls: list[Call] = []

        def record(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
            hidden = _hidden(args, kwargs)
            if calls and hidden is not _hidden(*calls[-1]):
                raise ApiqError(
                    f"the model changes the hidden states between its {type(self.blocks[0]).__name__} blocks "
                    f"{len(calls) - 1} and {len(calls)}; such a model cannot be quantized block by block."
                )
            calls.append((args, kwargs))
            return (hidden, None) if self.as_tuple else hidden

        try:
            for block in self.blocks:
                block.forward = record
            yield calls
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _without_hidden(call: Call) -> Call:
    args, kwargs = call
    return args[1:], {key: value for key, value in kwargs.items() if key not in ("hidden_states", "past_key_values")}
