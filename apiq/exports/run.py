"""`apiq export`: a quantized folder in the format of another program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apiq.device import DTYPES
from apiq.errors import ApiqError
from apiq.exports import awq, compressed_tensors, dense, gguf_file, gptq, own
from apiq.exports.shards import write_adapter
from apiq.exports.source import Source, open_source
from apiq.files import new_folder
from apiq.outputs import require_place

OWN = "apiq"


@dataclass(frozen=True)
class Format:
    """A format: what refuses, what writes, and what it is written in when nothing is said."""

    check: Callable[[Source, torch.dtype], None]
    write: Callable[[Source, Path, torch.dtype], None]
    default: Callable[[torch.dtype], torch.dtype]
    """The precision of the export by that of the checkpoint."""


def _own(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _holding_scales(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 else dtype


def _half(dtype: torch.dtype) -> torch.dtype:
    return torch.float16


FORMATS = {
    "compressed-tensors": Format(compressed_tensors.check, compressed_tensors.write, _holding_scales),
    "gptq-v2": Format(gptq.check_v2, gptq.write_v2, _half),
    "gptq": Format(gptq.check_v1, gptq.write_v1, _half),
    "awq": Format(awq.check, awq.write, _half),
    "gguf": Format(gguf_file.check, gguf_file.write, _own),
    "dense": Format(dense.check, dense.write, _own),
}


def export(
    folder: str | Path, out: str | Path, format: str, dtype: str = "auto", adapter_bits: int | None = None
) -> dict[str, Any]:
    """Write the quantized model in `folder`, or a finetuned folder with its base, to `out` in another format.

    Codes, scales and zero points are those of the checkpoint, bit for bit, or the export is refused before anything
    is written. What is not quantized is cast to `dtype`: auto is the precision of the checkpoint where the format
    holds the scales in it, else float16. The adapter lies beside, in `out`/adapter, in PEFT's format.

    Format `apiq` is that of the checkpoint, with the adapters inside, in 8 or 4 bits if `adapter_bits` says so.

    Returns:
        `format`, `dtype`, `linears`, `bytes` of the files, `out`; for `apiq` the effective bits.

    Raises:
        ApiqError: the format cannot hold the model as it is, or the folder is not whole.
    """
    if format == OWN and dtype == "auto":
        return own.write(open_source(folder), Path(out), adapter_bits) | {"format": format}
    if format == OWN or adapter_bits is not None:
        raise ApiqError(f"--dtype is for other formats than {OWN}, --adapter-bits for {OWN}; leave one of them out.")
    if format not in FORMATS:
        raise ApiqError(f"there is no format {format}; there are {', '.join([*FORMATS, OWN])}.")
    chosen, source = FORMATS[format], open_source(folder)
    require_place(out, folder, source.folder)
    precision = precision_of(dtype, chosen.default(source.dtype))
    chosen.check(source, precision)
    with new_folder(out) as new:
        chosen.write(source, new, precision)
        write_adapter(source, new)
    return summary(source, precision, Path(out)) | {"format": format}


def precision_of(name: str, default: torch.dtype) -> torch.dtype:
    """The precision that `name` asks for.

    Raises:
        ApiqError: there is none of that name.
    """
    if name != "auto" and name not in DTYPES:
        raise ApiqError(f"dtype is {name!r}; it should be auto, {', '.join(DTYPES)}.")
    return DTYPES.get(name, default)


def summary(source: Source, dtype: torch.dtype, out: Path) -> dict[str, Any]:
    """What was written to `out`."""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    precision = str(dtype).removeprefix("torch.")
    return {"dtype": precision, "linears": len(source.shapes), "bytes": size, "out": str(out)}
