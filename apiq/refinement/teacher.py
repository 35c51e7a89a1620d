"""What the full-precision model predicts at every position of windows, and its last hidden states there.

One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apiq.blocks.activations import TOKENS, Activations, batches, choose_home
from apiq.blocks.arguments import BlockCall
from apiq.blocks.capture import capture, completed
from apiq.blocks.stream import CPU, ModelStream
from apiq.device import precision
from apiq.memory import in_parts
from apiq.progress import Progress, Step
from apiq.refinement.divergence import top
from apiq.refinement.hidden import hidden_states

COPIES = 2
"""Sets of activations alive at a time: what enters a block and what leaves it."""
LOGITS = 2**28
"""Bytes that the logits in float32 may fill at a time; a few copies of them are alive."""

Told = tuple[Tensor, Tensor | None]
"""The likeliest tokens at some positions, as `divergence.top` gives them."""
Keep = Callable[[int, Tensor], None]
"""Keeps the hidden states (some windows, length, width) that begin with the window of this number."""


@dataclass(frozen=True)
class Predictions:
    """The k likeliest next tokens at every position (windows, length, k), as `divergence.top` gives them."""

    logs: Tensor
    index: Tensor | None
    power: Tensor | None = None
    """Mean square of an entry of the last hidden states, one number, where these are kept."""


@torch.no_grad()
def predictions(
    stream: ModelStream, windows: Tensor, k: int, device: torch.device, dtype: torch.dtype, folder: Path,
    progress: Progress, keep: Keep | None = None,
) -> Predictions:  # fmt: skip
    """What the model in `stream` predicts for `windows` (n, length), computed in `dtype` on `device`, kept on the CPU.

    With `keep` its last hidden states are handed there, a few windows at a time, in the precision of `dtype`. The
    activations between the blocks live on the device or in RAM where there is room for them, else in files of
    `folder` that have no name and go with the process.

    Raises:
        ApiqError: a block does not fit into the memory of the device with one window, or the model does not name its
            head, and hidden states are to be kept.
    """
    blocks = stream.blocks.modules
    with stream.embeddings(CPU) as model:
        X, calls = capture(
            model, blocks, windows, dtype, lambda shape: choose_home("auto", shape, dtype, COPIES, device, folder)
        )
    for index, call in enumerate(calls):
        X = _through(stream.load_block(index, device), call, X, dtype)
        progress(Step("refine", index + 1, len(calls), f"the full-precision model, block {index + 1}/{len(calls)}"))
    entries = stream.model.config.get_text_config().vocab_size
    with stream.rest(device) as model, hidden_states(model) if keep else nullcontext([]) as seen:

        def ask(tokens: Tensor, hidden: Tensor) -> Told:
            with precision(device, dtype):
                logits = completed(model, blocks, tokens.to(device), hidden)
            logs, index = top(logits, k)
            return logs.cpu(), None if index is None else index.cpu()

        return _told(_Asking(ask, seen, keep), windows, X, max(LOGITS // (4 * entries), 1), dtype)


def _through(block: nn.Module, call: BlockCall, X: Activations, dtype: torch.dtype) -> Activations:
    """What a block makes of X; it is gone from memory when this returns."""

    def run(hidden: Tensor, batch: slice) -> Tensor:
        with precision(X.device, dtype):
            return call.run(block, hidden, batch)

    return X.mapped(run)


@dataclass
class _Asking:
    """How the full-precision model is asked, and what becomes of its hidden states."""

    ask: Callable[[Tensor, Tensor], Told]
    seen: list[Tensor]
    keep: Keep | None
    square: float = 0.0
    """Sum of the squares of all that was kept."""
    count: int = 0


def _told(asking: _Asking, windows: Tensor, X: Activations, tokens: int, dtype: torch.dtype) -> Predictions:
    """What is said of all `windows` and what the last block gave for them, at most `tokens` positions at a time."""
    length, found = windows.shape[1], []

    def add(batch: slice) -> None:
        hidden, told, last = X[batch], [], []
        for piece in batches(length, tokens):
            told.append(asking.ask(windows[batch, piece], hidden[:, piece]))
            last += [each.to("cpu", dtype) for each in asking.seen]
        found.append(_joined(told, 1))
        if asking.keep is not None:
            rows = torch.cat(last, 1)
            asking.keep(batch.start, rows)
            asking.square += float(rows.double().square().sum())
            asking.count += rows.numel()

    size = max(min(TOKENS, tokens) // length, 1)
    in_parts(len(windows), size, add, "the predictions of the full-precision model")
    power = None if asking.keep is None else torch.tensor(asking.square / asking.count)
    return Predictions(*_joined(found, 0), power)


def _joined(parts: list[Told], dimension: int) -> Told:
    logs, index = zip(*parts, strict=True)
    return torch.cat(logs, dimension), None if index[0] is None else torch.cat(index, dimension)
