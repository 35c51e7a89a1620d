"""What the full-precision model predicts at every position of windows, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apiq.blocks.activations import TOKENS, Activations, batches, choose_home
from apiq.blocks.capture import capture, completed
from apiq.blocks.stream import CPU, ModelStream
from apiq.device import precision
from apiq.memory import in_parts
from apiq.progress import Progress, Step
from apiq.refinement.divergence import top

COPIES = 2
"""Sets of activations alive at a time: what enters a block and what leaves it."""
LOGITS = 2**28
"""Bytes that the logits in float32 may fill at a time; a few copies of them are alive."""

Told = tuple[Tensor, Tensor | None]
"""The likeliest tokens at some positions, as `divergence.top` gives them."""


@dataclass(frozen=True)
class Predictions:
    """The k likeliest next tokens at every position (windows, length, k), as `divergence.top` gives them."""

    logs: Tensor
    index: Tensor | None


@torch.no_grad()
def predictions(
    stream: ModelStream, windows: Tensor, k: int, device: torch.device, dtype: torch.dtype, folder: Path,
    progress: Progress,
) -> Predictions:  # fmt: skip
    """What the model in `stream` predicts for `windows` (n, length), computed in `dtype` on `device`, kept on the CPU.

    The activations between the blocks live on the device or in RAM where there is room for them, else in files of
    `folder` that have no name and go with the process.

    Raises:
        ApiqError: a block does not fit into the memory of the device with one window.
    """
    blocks = stream.blocks.modules
    with stream.embeddings(CPU) as model:
        X, calls = capture(
            model, blocks, windows, dtype, lambda shape: choose_home("auto", shape, dtype, COPIES, device, folder)
        )
    for index, call in enumerate(calls):
        block = stream.load_block(index, device)

        def run(hidden: Tensor, batch: slice, block: torch.nn.Module = block, call=call) -> Tensor:
            with precision(device, dtype):
                return call.run(block, hidden, batch)

        X = X.mapped(run)
        progress(Step("refine", index + 1, len(calls), f"the full-precision model, block {index + 1}/{len(calls)}"))
    entries = stream.model.config.get_text_config().vocab_size
    with stream.rest(device) as model:

        def ask(tokens: Tensor, hidden: Tensor) -> Told:
            with precision(device, dtype):
                logits = completed(model, blocks, tokens.to(device), hidden)
            logs, index = top(logits, k)
            return logs.cpu(), None if index is None else index.cpu()

        return Predictions(*_told(ask, windows, X, max(LOGITS // (4 * entries), 1)))


def _told(ask: Callable[[Tensor, Tensor], Told], windows: Tensor, X: Activations, tokens: int) -> Told:
    """What `ask` says of all `windows` and what the last block gave for them, at most `tokens` positions at a time."""
    length, found = windows.shape[1], []

    def add(batch: slice) -> None:
        hidden, pieces = X[batch], batches(length, tokens)
        found.append(_joined([ask(windows[batch, piece], hidden[:, piece]) for piece in pieces], 1))

    size = max(min(TOKENS, tokens) // length, 1)
    in_parts(len(windows), size, add, "the predictions of the full-precision model")
    return _joined(found, 0)


def _joined(parts: list[Told], dimension: int) -> Told:
    logs, index = zip(*parts, strict=True)
    return torch.cat(logs, dimension), None if index[0] is None else torch.cat(index, dimension)
