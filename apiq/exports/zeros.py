"""`apiq merge --into zeros`: pooled adapters into the zero points of the model, in as many bits as before."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from apiq.adapters.injection import IN_BLOCK
from apiq.adapters.pooled import factors, is_only_lora, values
from apiq.checkpoint import manifest
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.card import card
from apiq.checkpoint.grid_config import grid_entries
from apiq.checkpoint.rewriting import put_offsets, without_adapters
from apiq.checkpoint.writing import write_index
from apiq.errors import ApiqError
from apiq.exports.merging import Merger, merger_of
from apiq.exports.source import Linear, Source, open_source
from apiq.files import new_folder, read_json, write_json, write_text
from apiq.grids.normal_float import NormalFloat
from apiq.outputs import require_place


def merge_into_zeros(folder: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the model of a quantized or finetuned folder to `out` with its pooled adapters in the zero points.

    Q + c B A = s (codes - z) + o with o = c B V (out, G), where V (r, G) is what A (r, in) is within groups
    (QA-LoRA, arXiv 2309.14717). Codes, scales and zero points stay; o is stored as float32. In float32 the model
    computes what it computed with the adapter beside.

    Returns:
        `linears` with offsets, `effective_bits`, `bits` by part, `bytes`, `out`.

    Raises:
        ApiqError: the folder has no adapters, they are not pooled LoRA, or a linear has no zero points.
    """
    source, out = open_source(folder), Path(out)
    require_place(out, folder, source.folder)
    merger = merger_of(source)
    merged: list[str] = []
    with new_folder(out) as new:
        without_adapters(source.folder, new)
        files = []
        for file, _, linears in source.files():
            offsets = offsets_of(merger, linears)
            put_offsets(new / file, offsets)
            merged += offsets
            files.append(file)
        write_index(new, files, source.index["metadata"]["shapes"])
        _write_config(source, new, merged)
        bits = _write_facts(source, new)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"linears": len(merged), "effective_bits": bits["total"], "bits": bits, "bytes": size, "out": str(out)}


@torch.no_grad()
def offsets_of(merger: Merger, linears: list[Linear]) -> dict[str, Tensor]:
    """The offsets (out, G) that the adapters of some linears come to, float32, by the name of the linear.

    Raises:
        ApiqError: an adapter is not plain LoRA, its A differs within a group, or its linear has no zero points.
    """
    adapted = merger.adapted(linears)
    if adapted is None:
        return {}
    by_name = {linear.name: linear for linear in linears}
    return {
        name.removeprefix(IN_BLOCK): _offset(by_name[name.removeprefix(IN_BLOCK)], layer)
        for name, layer in adapted.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def _offset(linear: Linear, layer: Any) -> Tensor:
    if isinstance(linear.grid, NormalFloat):
        raise ApiqError(
            f"{linear.name} has NormalFloat levels and no zero points to merge into; quantize with a method of uniform "
            "levels, or merge with --into dense."
        )
    if not is_only_lora(layer):
        raise ApiqError(f"the adapter on {linear.name} is not plain LoRA; merge it with --into dense.")
    A, B, c = factors(layer)
    V = values(A, linear.grid.width(A.shape[1]))
    if V is None:
        raise ApiqError(
            f"the A of the adapter on {linear.name} differs within a group of its grid, so it does not fit into zero "
            "points; train it with finetune.pooled: true, or merge with --into dense."
        )
    return (c * (B.double() @ V.double())).float()


def _write_config(source: Source, new: Path, merged: list[str]) -> None:
    """Write config.json, which says where offsets are."""
    before = source.config["quantization_config"]
    prefix = f"{before['blocks']}."
    grids = {
        name.removeprefix(prefix): dataclasses.replace(grid, offsets=name in merged)
        for name, grid in source.grids.items()
    }
    kept = {key: value for key, value in before.items() if key not in ("exceptions", "offsets")}
    own = {**kept, "format": manifest.FORMAT, **grid_entries(grids)}
    write_json(new / "config.json", {**source.config, "quantization_config": own})


def _write_facts(source: Source, new: Path) -> dict[str, float]:
    """Write the metrics, the manifest and the card; the bits by part."""
    bits = effective_bits(new).as_dict()
    metrics = {**read_json(new / "metrics.json"), "effective_bits": bits["total"], "bits": bits}
    write_json(new / "metrics.json", metrics)
    facts = manifest.read(source.folder) or {}
    kept = {key: value for key, value in facts.items() if key not in ("format", "kind", "files")}
    manifest.write(new, "quantized", **kept, merged="zeros")
    write_text(new / "README.md", card(new))
    return bits
