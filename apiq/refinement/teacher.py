"""What the full-precision model predicts at every position of windows, with one block in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apiq.blocks.activations import TOKENS, batches, choose_home
from apiq.blocks.capture import capture, completed
from apiq.blocks.stream import CPU, ModelStream
from apiq.device import precision
from apiq.progress import Progress, Step
from apiq.refinement.divergence import top

COPIES = 2
"""Sets of activations alive at a time: what enters a block and what leaves it."""


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
    with stream.rest(device) as model:
        found = []
        for batch in batches(len(windows), max(TOKENS // windows.shape[1], 1)):
            with precision(device, dtype):
                logits = completed(model, blocks, windows[batch].to(device), X[batch])
            found.append([None if part is None else part.cpu() for part in top(logits, k)])
    logs, index = zip(*found, strict=True)
    return Predictions(torch.cat(logs), None if index[0] is None else torch.cat(index))
