"""Work on many windows in as large parts as the memory of the device holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from apiq.errors import ApiqError


class OutOfMemory(ApiqError):
    """Work on a single window does not fit into the memory of the device."""


def halved(size: int, what: str) -> int:
    """The next smaller number of windows to try after `size` did not fit.

    Raises:
        OutOfMemory: it was one window already; names `what` did not fit.
    """
    if size == 1:
        raise OutOfMemory(
            f"the device has not enough memory for {what} with one window; make calibration.length shorter, compute on "
            "a device with more memory, or, in quantize, take method apiq-lw."
        )
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return (size + 1) // 2


def in_parts(count: int, size: int, do: Callable[[slice], None], what: str) -> None:
    """Call `do` for slices of at most `size` that cover 0 .. count in order; halve the size where memory runs out.

    Raises:
        OutOfMemory: not even one window fits; names `what`.
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            do(slice(start, stop))
            start = stop
            continue
        except torch.OutOfMemoryError:
            pass  # what was allocated is held by the traceback until here
        size = halved(stop - start, what)
