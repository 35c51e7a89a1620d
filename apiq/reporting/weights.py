"""What the weights, codes and adapters of one block look like: the numbers behind the histograms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apiq.blocks.unfuse import unfuse
from apiq.checkpoint.loading import full_precision
from apiq.checkpoint.reading import LinearWeights, linear, linear_names
from apiq.errors import ApiqError
from apiq.files import read_json

BINS = 81


@dataclass(frozen=True)
class Histogram:
    """Share of the entries of a matrix in each bin."""

    edges: np.ndarray
    """Bounds of the bins, (BINS + 1)."""
    shares: np.ndarray
    """Sum to one, (BINS)."""


@dataclass(frozen=True)
class LinearShape:
    """One linear of the block: its matrices as histograms, its codes, and how far it is from W."""

    name: str
    weights: dict[str, Histogram]
    """Of `W`, `Q` and `A Bᵀ` (times alpha / r) on common bins, as far as they exist."""
    adapters: dict[str, Histogram]
    """Of `A` and `B` on common bins; empty without adapters."""
    codes: np.ndarray
    """Share of the weights that have each code, (levels)."""
    error_without: float | None
    """||W - Q|| / ||W|| (Frobenius); None without W."""
    error_with: float | None
    """||W - (Q + A B^T)|| / ||W||; None without W or without adapters."""


def block_shapes(quantized: Path, model: Path | None, block: int) -> tuple[int, list[LinearShape]]:
    """The number of block `block` (negative counts from the last) and the shape of each of its linears, in order.

    `model` is the folder of the full-precision weights, None if they are not at hand.

    Raises:
        ApiqError: the checkpoint has no such block, or a file is damaged or of another model.
    """
    config = read_json(quantized / "config.json")["quantization_config"]
    prefix, names = f"{config['blocks']}.", linear_names(quantized)
    count = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in names)
    if not -count <= block < count:
        raise ApiqError(
            f"report.histogram_block is {block}; it must be 0 to {count - 1}, "
            f"or -1 to -{count} counted from the last, the blocks of {quantized}."
        )
    number = block % count
    in_block = [name for own in config["linears"] if (name := f"{prefix}{number}.{own}") in names]
    weights = {} if model is None else _weights(model, number, len(f"{prefix}{number}."), in_block)
    return number, [_shape(name, linear(quantized, name), weights.get(name)) for name in in_block]


def _shape(name: str, found: LinearWeights, W: Tensor | None) -> LinearShape:
    weights = {"Q": found.Q} if W is None else {"W": W, "Q": found.Q}
    adapters: dict[str, Tensor] = {}
    if found.A is not None and found.B is not None:
        adapters = {"A": found.A, "B": found.B}
        weights["A Bᵀ"] = found.scaling * (found.B @ found.A)
    return LinearShape(
        name,
        _histograms(weights),
        _histograms(adapters),
        torch.bincount(found.codes.flatten().long(), minlength=found.grid.top + 1).numpy() / found.codes.numel(),
        None if W is None else float((W - found.Q).norm() / W.norm()),
        None if W is None or not adapters else float((W - found.Q - weights["A Bᵀ"]).norm() / W.norm()),
    )


def _histograms(matrices: dict[str, Tensor]) -> dict[str, Histogram]:
    """Histograms on common bins, symmetric about zero, which lies in the middle of a bin."""
    bound = max((float(matrix.abs().max()) for matrix in matrices.values()), default=0.0) or 1.0
    edges = np.linspace(-bound, bound, BINS + 1)
    return {
        name: Histogram(edges, np.histogram(matrix.numpy(), edges)[0] / matrix.numel())
        for name, matrix in matrices.items()
    }


def _weights(model: Path, number: int, prefix: int, names: list[str]) -> dict[str, Tensor]:
    """The full-precision weights (out, in) of the linears of a block in float32, by their names in the model."""
    stream = full_precision(model, torch.float32).stream
    try:
        block = unfuse(stream.load_block(number, torch.device("cpu")))
        found = {name: block.get_submodule(name[prefix:]).get_parameter("weight") for name in names}
    except (AttributeError, IndexError):
        raise ApiqError(f"{model} lacks a linear of block {number}: it is not the model that was quantized.") from None
    return {name: weight.detach() for name, weight in found.items()}
