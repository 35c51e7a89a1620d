"""What a refinement has done so far, in its work folder."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiq.blocks.store import replacing
from apiq.errors import ApiqError

STATE = "descent.pt"


class Kept:
    """Tensors that are made once, and the state of the descent after its last finished pass."""

    def __init__(self, folder: Path):
        self.folder = folder

    def once(self, name: str, make: Callable[[], Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
        """What `make` gives, without what is None; made and written the first time, read after that."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            tensors = {key: value.contiguous() for key, value in make().items() if value is not None}
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        return load_file(path)

    def load(self) -> dict[str, Any] | None:
        """The state of the descent, or None before its first pass has ended.

        Raises:
            ApiqError: the file is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ApiqError(
                f"the unfinished work in {self.folder} is damaged ({type(error).__name__}); delete it and start again."
            ) from None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state of the descent."""
        with replacing(self.folder / STATE) as temporary:
            torch.save(state, temporary)
