"""An input embedding that stays in the precision in which it was stored, whatever the arithmetic is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)
ROWS = 4096
"""Rows that are looked at at a time."""


def keep_narrow(model: Any) -> None:
    """Hold the input embedding in 16 bits where they hold every number of it; what it returns stays as it was.

    It is only looked up, so nothing is computed in 16 bits. An embedding that is the head too, or that does more than
    look up, is left alone.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or getattr(head, "weight", None) is embedding.weight:
        return
    weight = embedding.weight.detach()
    wide = weight.dtype
    for dtype in NARROW:
        if dtype.itemsize < wide.itemsize and _holds(weight, dtype):
            embedding.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            embedding.register_forward_hook(lambda module, ids, found: found.to(wide))
            return


def _holds(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether each number of `weight` (entries, width) is one of `dtype`."""
    return all(torch.equal(rows.to(dtype).to(rows.dtype), rows) for rows in weight.split(ROWS))
