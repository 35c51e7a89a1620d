"""Finished blocks on disk, with the activations that the next block starts from: a walk can be taken up again.

A block counts as finished once `state.json` says so; everything it needs is written, and renamed into
place, before. What a killed process left half-written carries a temporary name and is not looked at.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiq.blocks.activations import Activations, home_of
from apiq.errors import ApiqError
from apiq.files import read_json, write_json

STATE = "state.json"


class BlockStore:
    """The work folder of one walk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.cpu_seconds = 0.0
        if (folder / STATE).exists():
            state = read_json(folder / STATE)
            self.records, self.cpu_seconds = state["records"], state["cpu_seconds"]

    def save_adapters(self, index: int, adapters: Mapping[str, Tensor]) -> None:
        """Write the adapters of block `index`."""
        with replacing(self.folder / f"adapter-{index:03d}.safetensors") as path:
            save_file({name: value.cpu().contiguous() for name, value in adapters.items()}, path)

    def adapters(self) -> list[dict[str, Tensor]]:
        """The adapters of every finished block."""
        return [load_file(self.folder / f"adapter-{index:03d}.safetensors") for index in range(len(self.records))]

    def save_activations(self, index: int, X: Activations, Xq: Activations) -> None:
        """Write the inputs of block `index` in the full-precision and in the quantized model."""
        with replacing(self._activations(index)) as path:
            save_file({"X": X.rows.cpu(), "Xq": Xq.rows.cpu()}, path)

    def activations(self, index: int, device: torch.device, copies: int) -> tuple[Activations, Activations]:
        """Read what `save_activations` wrote.

        Raises:
            ApiqError: the file is damaged.
        """
        try:
            tensors = load_file(self._activations(index))
        except (SafetensorError, FileNotFoundError) as error:
            raise ApiqError(
                f"the unfinished work in {self.folder} is damaged ({error}); delete it and start again."
            ) from None
        X, Xq = tensors["X"], tensors["Xq"]
        home = home_of(tuple(X.shape), X.dtype, copies, device)
        return Activations(X.to(home), device), Activations(Xq.to(home), device)

    def finish(self, record: dict[str, Any], cpu_seconds: float) -> None:
        """Declare the next block finished, and drop the activations that it started from."""
        self.records.append(record)
        self.cpu_seconds = cpu_seconds
        write_json(self.folder / STATE, {"records": self.records, "cpu_seconds": cpu_seconds})
        self._activations(len(self.records) - 1).unlink(missing_ok=True)

    def _activations(self, index: int) -> Path:
        return self.folder / f"activations-{index:03d}.safetensors"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that takes its place when the block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
