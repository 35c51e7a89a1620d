"""The format of `apiq` once more: adapters that were trained on a folder inside it, in few bits if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apiq.checkpoint import manifest
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.adapter_file import read_adapter
from apiq.checkpoint.card import card
from apiq.checkpoint.rewriting import rewritten
from apiq.errors import ApiqError
from apiq.exports.source import Source
from apiq.files import new_folder, read_json, write_json, write_text
from apiq.outputs import require_place

ADAPTER_BITS = (8, 4)


def write(source: Source, out: Path, adapter_bits: int | None) -> dict[str, Any]:
    """Write the quantized folder of `source` with its adapters to `out`, their matrices in `adapter_bits`.

    Codes, scales and everything else are those of the folder, byte for byte.

    Returns:
        `effective_bits`, `bits` by part, `bytes` of the files, `out`.

    Raises:
        ApiqError: there are no adapters, or none of so many bits.
    """
    if source.adapter is None:
        raise ApiqError(f"{source.folder} has no adapters; format apiq is for folders that have.")
    if adapter_bits is not None and adapter_bits not in ADAPTER_BITS:
        raise ApiqError(f"--adapter-bits is {adapter_bits}; it should be 8, 4 or left out.")
    require_place(out, source.folder, source.adapter.parent)
    facts = manifest.read(source.folder) or {}
    with new_folder(out) as new:
        rewritten(source.folder, new, {}, read_adapter(source.adapter), adapter_bits)
        bits = effective_bits(new).as_dict()
        metrics = {**read_json(new / "metrics.json"), "effective_bits": bits["total"], "bits": bits}
        write_json(new / "metrics.json", metrics)
        kept = {key: value for key, value in facts.items() if key not in ("format", "kind", "files")}
        manifest.write(new, "quantized", **kept)
        write_text(new / "README.md", card(new))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"effective_bits": bits["total"], "bits": bits, "bytes": size, "out": str(out)}
