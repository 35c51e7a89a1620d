"""The activations that enter and leave a block for all calibration windows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from apiq import parallel
from apiq.memory import in_parts
from apiq.ram import free_ram

TOKENS = 2**12
"""Tokens in a forward pass without gradients: enough to keep a GPU busy, little enough for the caches of a CPU."""


@dataclass(frozen=True)
class Home:
    """Where activations are kept between their uses on `device`."""

    kind: Literal["device", "memory", "disk"]
    device: torch.device
    folder: Path | None = None
    """Folder of the files that they are mapped from, for kind disk."""

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor; mapped from a file that goes with it, for kind disk.

        Raises:
            OSError: the disk is full.
        """
        if self.kind == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.kind == "memory":
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=self.folder, prefix=".activations-")
        size = max(torch.Size(shape).numel(), 1)
        try:
            try:
                rows = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
            finally:
                os.unlink(path)  # empty as yet; the mapping lives on, and its room goes however the process ends
            if hasattr(os, "posix_fallocate"):  # macOS lacks it
                os.posix_fallocate(handle, 0, size * dtype.itemsize)  # a full disk is met here, not in the mapping
            else:
                os.truncate(handle, size * dtype.itemsize)
        finally:
            os.close(handle)
        return rows


def choose_home(
    wanted: str, shape: tuple[int, ...], dtype: torch.dtype, copies: int, device: torch.device, folder: Path | None
) -> Home:
    """The home that `wanted` (auto, device, memory, disk) stands for, for `copies` tensors of `shape`.

    auto: the device if they fill at most half of what is free there, else memory by the same rule,
    else files in `folder`.
    """
    if wanted != "auto":
        return Home("device" if wanted == "memory" and device.type == "cpu" else wanted, device, folder)  # type: ignore[arg-type]
    need = copies * torch.Size(shape).numel() * dtype.itemsize
    if device.type == "cuda" and need <= torch.cuda.mem_get_info(device)[0] // 2:
        return Home("device", device)
    if need <= free_ram() // 2 or folder is None:
        return Home("device" if device.type == "cpu" else "memory", device)
    return Home("disk", device, folder)


class Activations:
    """A tensor (windows, length, width), kept where there is room and handed out batch by batch on the device."""

    def __init__(self, rows: Tensor, home: Home):
        self.rows = rows
        self.home = home

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, home: Home) -> Activations:
        """Room for activations of `shape` at `home`."""
        return cls(home.room(shape, dtype), home)

    @property
    def device(self) -> torch.device:
        """Where they are computed with."""
        return self.home.device

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, batch: slice) -> Tensor:
        return self.rows[batch].to(self.device, non_blocking=True)

    def __setitem__(self, batch: slice, value: Tensor) -> None:
        self.rows[batch].copy_(value.detach(), non_blocking=False)

    def moved(self, home: Home) -> Activations:
        """A copy at another home."""
        result = Activations.empty(tuple(self.rows.shape), self.rows.dtype, home)
        for batch in batches(len(self), 1):
            result[batch] = self.rows[batch]
        return result

    def like(self) -> Activations:
        """Room of the same shape, dtype and home."""
        return Activations.empty(tuple(self.rows.shape), self.rows.dtype, self.home)

    @torch.no_grad()
    def mapped(self, function: Callable[[Tensor, slice], Tensor], batch_size: int = 1) -> Activations:
        """What `function` makes of the windows, `batch_size` or more at a time; it must keep the shape.

        Raises:
            ApiqError: not even one window at a time fits into memory.
        """
        result = self.like()

        def fill(batch: slice) -> None:
            result[batch] = function(self[batch], batch)

        in_parts(len(self), at_once(self, batch_size), fill, "a forward pass of a block")
        return result


def batches(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover 0 .. count in order."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def at_once(activations: Activations, batch_size: int = 1) -> int:
    """Windows in a forward pass without gradients: at least those of a step."""
    return max(TOKENS // activations.rows.shape[1], batch_size, 1)


@torch.no_grad()
def mean_squared_error(
    outputs: Callable[[slice], Tensor], targets: Activations, batch_size: int = 1, counted: Tensor | None = None
) -> float:
    """Mean over all entries of (outputs - targets)^2, added in float64 on the device, `batch_size` or more at a time.

    `counted` (windows, length) leaves out the positions where it is False.
    """
    total = torch.zeros((), dtype=torch.float64, device=targets.device)

    def add(batch: slice) -> None:
        square = (outputs(batch).float() - targets[batch].float()).square()
        if counted is not None:
            square = square * counted[batch].unsqueeze(-1)
        total.add_(square.sum(dtype=torch.float64))

    in_parts(len(targets), at_once(targets, batch_size), add, "a forward pass of a block")
    entries = targets.rows.numel() if counted is None else int(counted.sum()) * targets.rows.shape[-1]
    both = parallel.add(torch.stack([total, torch.full_like(total, entries)]))
    return float(both[0]) / max(float(both[1]), 1.0)
