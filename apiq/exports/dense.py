"""Dequantized weights in 16 or 32 bits: what every program reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from apiq.errors import ApiqError
from apiq.exports.shards import cast, each, write_folder
from apiq.exports.source import Linear, Source
from apiq.files import read_json


def check(source: Source, dtype: torch.dtype) -> None:
    """Everything can be dequantized that transformers does not keep in fused tensors.

    Raises:
        ApiqError: the linears are part of fused tensors, or PEFT would put the adapter on them in another way.
    """
    if source.transposed and source.adapter is not None:
        kind = read_json(source.adapter / "adapter_config.json")["peft_type"]
        if kind != "LORA":
            raise ApiqError(
                f"the linears of {source.family} models are Conv1D in transformers, on which adapters of type {kind} "
                "are not what they were; put the adapter into the weights with apiq merge."
            )


def write(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Q, computed in float32 and rounded once to `dtype`, under the name of the weight.

    Raises:
        ApiqError: a number is too large for `dtype`.
    """

    def tensors(linear: Linear) -> dict[str, Tensor]:
        weight = linear.dequantized()
        weight = weight.t() if linear.name in source.transposed else weight
        return {f"{linear.name}.weight": cast(weight, dtype, linear.name)}

    write_folder(source, folder, each(tensors), dtype)
