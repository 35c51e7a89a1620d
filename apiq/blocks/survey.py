"""What a method may learn of the whole model before the first block is solved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from apiq.blocks.activations import Activations
from apiq.blocks.capture import BlockCall
from apiq.blocks.stream import ModelStream


@dataclass(frozen=True)
class Whole:
    """A model on disk, and the calibration windows."""

    stream: ModelStream
    windows: Tensor | None
    """Token numbers (windows, length); None without calibration."""
    X: Activations | None
    """The input of the first block."""
    calls: list[BlockCall]
    """What each block is called with besides the hidden states."""
    device: torch.device
    wanted_home: str
    """quantize.activations: where activations are to be kept."""
    folder: Path
    """Where they are kept if on disk."""
    precision: Callable[[], AbstractContextManager]
    """The precision in which blocks are to be computed."""
    report: Callable[[str, int], None]
    """Called with what is being done and for which block."""


@runtime_checkable
class Surveyor(Protocol):
    """A method that looks at the whole model first. What it finds is kept with the unfinished work."""

    def survey(self, whole: Whole) -> dict[str, Tensor]:
        """Look at the model; what was found, small and by name."""
        ...

    def surveyed(self, found: dict[str, Tensor]) -> None:
        """Take in what was found, now or before the run was interrupted."""
        ...
