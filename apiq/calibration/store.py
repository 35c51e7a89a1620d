"""Token windows on disk: `windows.parquet` (one row a window) and `manifest.json` (their origin and hash)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from apiq import files
from apiq.errors import ApiqError

WINDOWS = "windows.parquet"
MANIFEST = "manifest.json"


def write(folder: str | Path, windows: torch.Tensor, manifest: Mapping[str, Any]) -> None:
    """Write windows, and a manifest to which their number, length and hash are added, as a new folder.

    Args:
        folder: what takes the place of its old content.
        windows: token ids, shape (windows, length).
        manifest: where the windows came from; plain JSON values.
    """
    count, length = windows.shape
    rows = pyarrow.ListArray.from_arrays(
        np.arange(0, count * length + 1, length, dtype=np.int32), windows.numpy().astype(np.int32).ravel()
    )
    with files.new_folder(folder) as new:
        parquet.write_table(pyarrow.table({"input_ids": rows}), new / WINDOWS)
        shape = {"windows": count, "length": length, "files": {WINDOWS: files.sha256(new / WINDOWS)}}
        files.write_json(new / MANIFEST, {**manifest, **shape})


def read(folder: str | Path) -> torch.Tensor:
    """The windows in a folder that `write` wrote.

    Returns:
        Token ids, int64, shape (windows, length).

    Raises:
        ApiqError: the folder is missing, incomplete, or no longer what its manifest says.
    """
    path = Path(folder) / WINDOWS
    if not path.is_file():
        raise ApiqError(f"there are no calibration windows in {folder}; run the calibration stage first.")
    manifest = files.read_json(Path(folder) / MANIFEST)
    if files.sha256(path) != manifest.get("files", {}).get(WINDOWS):
        raise ApiqError(
            f"{path} is damaged: it is not the file that {MANIFEST} describes; run the calibration stage again."
        )
    values = parquet.read_table(path)["input_ids"].combine_chunks().flatten().to_numpy()
    return torch.from_numpy(values.astype(np.int64)).view(manifest["windows"], manifest["length"])
