"""What a refinement has done so far, in its work folder."""

from __future__ import annotations

import bisect
import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiq.blocks.store import replacing
from apiq.errors import ApiqError
from apiq.files import read_json, write_json
from apiq.meter import Meter

STATE = "descent.pt"
SPENT = "spent.json"


class Kept:
    """Tensors that are made once, the state of the descent after its last finished pass, and the time all this took."""

    def __init__(self, folder: Path, meter: Meter):
        self.folder, self._meter = folder, meter
        self._before = read_json(folder / SPENT) if (folder / SPENT).exists() else {}

    def cost(self) -> dict[str, float]:
        """The reading of the meter, with the seconds of stopped processes up to what they kept last."""
        now = self._meter.reading()
        return {**now, **{key: round(now[key] + self._before.get(key, 0.0), 3) for key in ("seconds", "cpu_seconds")}}

    def once(self, name: str, make: Callable[[], Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
        """What `make` gives, without what is None; made and written the first time, read after that.

        Raises:
            ApiqError: what was written is damaged.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            tensors = {key: value.contiguous() for key, value in make().items() if value is not None}
            with replacing(path) as temporary:
                save_file(tensors, temporary)
            del tensors
            self._note_cost()
        with self._whole():
            return load_file(path)

    def pieces(self, name: str) -> list[Tensor]:
        """The rows that were kept under `name`, piece by piece in their order.

        Raises:
            ApiqError: one of them is damaged.
        """
        with self._whole():
            return [load_file(path)["rows"] for path in sorted(self.folder.glob(f"{name}-*.safetensors"))]

    def rows(self, name: str) -> Rows:
        """The same, without reading them."""
        with self._whole():
            return Rows(sorted(self.folder.glob(f"{name}-*.safetensors")))

    def forget(self, name: str) -> None:
        """Remove the pieces that were kept under `name`."""
        for path in self.folder.glob(f"{name}-*.safetensors"):
            path.unlink()

    def keep(self, name: str, start: int, rows: Tensor, whole: bool = True) -> None:
        """Write the piece of `name` whose first row is number `start` of all.

        With `whole` it is of use by itself, so that the time until now is not lost whatever happens.
        """
        with replacing(self.folder / f"{name}-{start:09d}.safetensors") as temporary:
            save_file({"rows": rows.contiguous()}, temporary)
        if whole:
            self._note_cost()

    def load(self) -> dict[str, Any] | None:
        """The state of the descent, or None before its first pass has ended.

        Raises:
            ApiqError: the file is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        with self._whole():
            return torch.load(path, weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state of the descent."""
        with replacing(self.folder / STATE) as temporary:
            torch.save(state, temporary)
        self._note_cost()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ApiqError(
                f"the unfinished work in {self.folder} is damaged ({type(error).__name__}); delete it and start again."
            ) from None

    def _note_cost(self) -> None:
        cost = self.cost()
        write_json(self.folder / SPENT, {key: cost[key] for key in ("seconds", "cpu_seconds")})


class Rows:
    """Rows in several files, read when they are asked for."""

    def __init__(self, paths: Sequence[Path]):
        self._paths, self._ends = paths, []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self._ends.append(len(self) + file.get_slice("rows").get_shape()[0])

    def __len__(self) -> int:
        """Their number."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, batch: slice) -> Tensor:
        """Some of them that follow each other."""
        found, start = [], batch.start
        while start < batch.stop:
            place = bisect.bisect_right(self._ends, start)
            first, end = ([0, *self._ends])[place : place + 2]
            stop = min(batch.stop, end)
            with safe_open(self._paths[place], framework="pt") as file:
                found.append(file.get_slice("rows")[start - first : stop - first])
            start = stop
        return torch.cat(found)
