"""Finished blocks on disk, with the activations that the next block starts from: a walk can be taken up again.

A block counts as finished once `state.json` says so; everything it needs is written, and renamed into
place, before. What a killed process left half-written carries a temporary name and is not looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiq import parallel
from apiq.blocks.activations import Activations, Home, batches
from apiq.checkpoint.layout import block_file
from apiq.errors import ApiqError
from apiq.files import read_json, write_json

STATE = "state.json"
SURVEY = "survey.safetensors"
ROWS = 8
"""Windows that are read or written at a time."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class BlockStore:
    """The work folder of one walk."""

    def __init__(self, folder: Path):
        """Take up what is in the folder.

        Raises:
            ApiqError: a file of a finished block is missing or damaged.
        """
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.cpu_seconds = 0.0
        if not (folder / STATE).exists():
            return
        with self._unharmed():
            state = read_json(folder / STATE)
            self.records, self.cpu_seconds = state["records"], state["cpu_seconds"]
            for index in range(len(self.records)):
                for path in (folder / block_file(index), self._adapters(index)):
                    with safe_open(path, framework="pt"):  # which compares its header and its size
                        pass

    def save_adapters(self, index: int, adapters: Mapping[str, Tensor]) -> None:
        """Write the adapters of block `index`."""
        with replacing(self._adapters(index)) as path:
            save_file({name: value.cpu().contiguous() for name, value in adapters.items()}, path)

    def adapters(self) -> list[dict[str, Tensor]]:
        """The adapters of every finished block."""
        return [load_file(self._adapters(index)) for index in range(len(self.records))]

    def save_activations(self, index: int, X: Activations, Xq: Activations) -> None:
        """Write the inputs of block `index` in the full-precision and in the quantized model."""
        with replacing(self._activations(index)) as path:
            write_rows(path, {"X": X, "Xq": Xq})

    def activations(self, index: int, home: Home) -> tuple[Activations, Activations]:
        """Read what `save_activations` wrote to where it is to live.

        Raises:
            ApiqError: the file is damaged.
        """
        with self._unharmed(), safe_open(self._activations(index), framework="pt") as file:
            return _read_rows(file, "X", home), _read_rows(file, "Xq", home)

    def save_survey(self, found: Mapping[str, Tensor]) -> None:
        """Write what a method found out of the whole model."""
        with replacing(self.folder / SURVEY) as path:
            save_file({name: value.cpu().contiguous() for name, value in found.items()}, path)

    def survey(self) -> dict[str, Tensor] | None:
        """Read it; None before it was written.

        Raises:
            ApiqError: the file is damaged.
        """
        if not (self.folder / SURVEY).exists():
            return None
        with self._unharmed():
            return load_file(self.folder / SURVEY)

    def finish(self, record: dict[str, Any], cpu_seconds: float) -> None:
        """Declare the next block finished, and drop the activations that it started from."""
        self.records.append(record)
        self.cpu_seconds = cpu_seconds
        parallel.wait()  # for what the other processes write
        if parallel.rank() == 0:
            write_json(self.folder / STATE, {"records": self.records, "cpu_seconds": cpu_seconds})
        parallel.wait()
        self._activations(len(self.records) - 1).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Say of what cannot be read that it is damaged."""
        try:
            yield
        except (SafetensorError, FileNotFoundError, KeyError, TypeError, ApiqError) as error:
            told = " ".join(str(error).split()).rstrip(".")
            raise ApiqError(
                f"the unfinished work in {self.folder} is damaged ({told}); delete it and start again."
            ) from None

    def _adapters(self, index: int) -> Path:
        return self.folder / f"adapter-{index:03d}.safetensors"

    def _activations(self, index: int) -> Path:
        own = f"-{parallel.rank()}" if parallel.size() > 1 else ""
        return self.folder / f"activations-{index:03d}{own}.safetensors"


def write_rows(path: Path, activations: Mapping[str, Activations]) -> None:
    """Write activations as safetensors, a few windows at a time: there may not be memory for all of them."""
    header, end = {}, 0
    for name, value in activations.items():
        start, end = end, end + value.rows.numel() * value.rows.dtype.itemsize
        kind = _DTYPES[value.rows.dtype]
        header[name] = {"dtype": kind, "shape": list(value.rows.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in activations.values():
            for batch in batches(len(value), ROWS):
                file.write(value.rows[batch].cpu().contiguous().view(torch.uint8).numpy().data)


def _read_rows(file: Any, name: str, home: Home) -> Activations:
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    first = stored[:1]
    result = Activations.empty(shape, first.dtype, home)
    for batch in batches(len(result), ROWS):
        result[batch] = stored[batch.start : batch.stop]
    return result


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that takes its place when the block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
