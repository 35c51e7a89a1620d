"""The activations that enter and leave a block for all calibration windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Activations:
    """A tensor (windows, length, width), kept where there is room and handed out batch by batch on the device."""

    def __init__(self, rows: Tensor, device: torch.device):
        self.rows = rows
        self.device = device

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, home: torch.device) -> Activations:
        """Room for activations of `shape`, kept on `home` and computed with on `device`."""
        return cls(torch.empty(shape, dtype=dtype, device=home, pin_memory=home.type != device.type), device)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, batch: slice) -> Tensor:
        return self.rows[batch].to(self.device, non_blocking=True)

    def __setitem__(self, batch: slice, value: Tensor) -> None:
        self.rows[batch].copy_(value.detach(), non_blocking=False)

    def like(self) -> Activations:
        """Room of the same shape, dtype and home."""
        return Activations.empty(tuple(self.rows.shape), self.rows.dtype, self.device, self.rows.device)

    @torch.no_grad()
    def mapped(self, function: Callable[[Tensor, slice], Tensor], batch_size: int) -> Activations:
        """What `function` makes of each batch and the windows that it holds; it must keep the shape."""
        result = self.like()
        for batch in batches(len(self), batch_size):
            result[batch] = function(self[batch], batch)
        return result


def batches(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover 0 .. count in order."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def home_of(shape: tuple[int, ...], dtype: torch.dtype, copies: int, device: torch.device) -> torch.device:
    """Where `copies` tensors of activations should live: on the GPU if they fill at most half of what is free."""
    if device.type != "cuda":
        return torch.device("cpu")
    need = copies * torch.Size(shape).numel() * dtype.itemsize
    return device if need <= torch.cuda.mem_get_info(device)[0] // 2 else torch.device("cpu")


@torch.no_grad()
def mean_squared_error(
    outputs: Callable[[slice], Tensor], targets: Activations, batch_size: int, counted: Tensor | None = None
) -> float:
    """Mean over all entries of (outputs - targets)^2, added in float64 on the device, batch by batch.

    `counted` (windows, length) leaves out the positions where it is False.
    """
    total = torch.zeros((), dtype=torch.float64, device=targets.device)
    for batch in batches(len(targets), batch_size):
        square = (outputs(batch).float() - targets[batch].float()).square()
        if counted is not None:
            square = square * counted[batch].unsqueeze(-1)
        total += square.sum(dtype=torch.float64)
    entries = targets.rows.numel() if counted is None else int(counted.sum()) * targets.rows.shape[-1]
    return float(total) / max(entries, 1)
