"""How far the weights and the activations of a quantized model are from those of the full-precision one.

    X = Xq = embeddings(windows)
    for F, Q in zip(blocks of the full-precision model, blocks of the quantized model):
        compare F(X) with Q(X)     own: the input of the block is the full-precision one
        compare F(X) with Q(Xq)    accumulated: its input comes from the quantized blocks before
        X, Xq = F(X), Q(Xq)

The full-precision model is streamed, one block at a time; the quantized one, small as it is, is in memory.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apiq.adapters.unwrapped import unwrapped
from apiq.blocks.activations import Activations, choose_home
from apiq.blocks.architecture import linears
from apiq.blocks.capture import BlockCall, capture
from apiq.blocks.stream import ModelStream
from apiq.blocks.unfuse import unfuse
from apiq.calibration.corpora import load_corpus
from apiq.calibration.windows import consecutive_windows, tokenize
from apiq.checkpoint.loading import Loaded, full_precision, load
from apiq.checkpoint.reading import LinearWeights, linear
from apiq.errors import ApiqError
from apiq.evaluation.perplexity import refuse
from apiq.evaluation.side_by_side import BLOCK, SideBySide
from apiq.params import EvaluateParams
from apiq.progress import Progress, Step, naming, silent
from apiq.work import work_root

COPIES = 4
"""Sets of activations alive at a time: X, Xq, and what the block in hand makes of them."""


@dataclass(frozen=True)
class Errors:
    """The errors of one linear, or of the output of a block; None where there is no such thing or it is not known.

    Norms of weights are Frobenius norms. Those of activations are means over all tokens of the Euclidean norm of what
    a linear (with its adapters) or block gives for one token, as in Figure 4 of arXiv 2402.05147.
    """

    block: int
    """Number of the block, from 0."""
    linear: str
    """Name in the block, as in `self_attn.q_proj`; BLOCK for the block as a whole."""
    weight_norm: float | None = None
    """||W||."""
    weight_error_without: float | None = None
    """||W - Q||."""
    weight_error_with: float | None = None
    """||W - (Q + alpha / r B A)||; None where no LoRA, the only adapter that is such a sum, stands on the linear."""
    activation_norm: float | None = None
    """||W X||."""
    activation_error_own: float | None = None
    """||W X - (Q + alpha / r B A) X'||, where X' is made by the quantized block of its full-precision input."""
    activation_error_accumulated: float | None = None
    """The same with Xq in the place of X', where all blocks before are quantized too."""


def compare_errors(
    model: str | Path, quantized: Mapping[str, Path], params: EvaluateParams, progress: Progress = silent
) -> dict[str, list[Errors]]:
    """The errors of each of the `quantized` folders, made from `model`, by the name that it carries in the results.

    Activations are compared on the first `error_windows` windows of the first corpus of `perplexity`: text that no
    method was fitted on, the same on which the loss is measured. Without a corpus only weights are compared.

    Raises:
        ApiqError: a folder is not quantized or was made from another model, or the corpus cannot be had.
    """
    found: dict[str, list[Errors]] = {}
    for name, folder in quantized.items():
        loaded = load(folder, dtype=params.dtype, device=params.device)
        original = full_precision(model, loaded.model.dtype).stream
        windows = _windows(params, loaded)
        found[name] = list(errors(original, loaded, windows, params.batch_size, naming(name, progress)))
        del loaded
    return found


@torch.no_grad()
def errors(
    original: ModelStream,
    loaded: Loaded,
    windows: Tensor | None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Iterator[Errors]:
    """The errors of a block, then of every packed linear in it, block after block.

    Args:
        original: the full-precision model, streamed in the dtype of `loaded`.
        loaded: the quantized model, on its device.
        windows: token ids (n, L), int64; None compares weights only.
        batch_size: windows in one forward pass.
        progress: told after every block.

    Raises:
        ApiqError: `loaded` is not quantized, or was not made from `original`.
    """
    deployed, place = _deployed(original, loaded), next(loaded.model.parameters()).device
    X, calls = (None, []) if windows is None else _start(original, windows, place)
    Xq = X
    for index, quantized in enumerate(deployed):
        block, prefix = unfuse(original.load_block(index, place)), f"{original.blocks.path}.{index}"
        packed = [name for name in linears(block) if name in loaded.model.config.quantization_config.linears]
        rows = {name: _weights(block.get_submodule(name), f"{prefix}.{name}", loaded.folder) for name in packed}
        if X is not None and Xq is not None:
            both = SideBySide(block, quantized, calls[index], packed)
            X, Xq = both.propagate(X, Xq, batch_size)
            means = _means(both)
            rows = {BLOCK: means[BLOCK]} | {name: values | means.get(name, {}) for name, values in rows.items()}
        yield from (Errors(index, name, **values) for name, values in rows.items())
        progress(Step("errors", index + 1, len(deployed), f"block {index + 1}/{len(deployed)}"))


def weight_errors(W: Tensor, found: LinearWeights) -> dict[str, float]:
    """The fields `weight_...` of `Errors` for one linear with full-precision weight W (out, in)."""
    W = W.float()
    left = W - found.Q.to(W.device)
    values = {"weight_norm": float(W.norm()), "weight_error_without": float(left.norm())}
    if found.A is not None and found.B is not None:
        values["weight_error_with"] = float((left - found.scaling * (found.B @ found.A).to(W.device)).norm())
    return values


def summary(rows: Sequence[Errors]) -> dict[str, float]:
    """The means over all linears of their relative errors, those that are known and finite.

    `weight` is ||W - (Q + alpha / r B A)|| / ||W||, or ||W - Q|| / ||W|| where no such sum is; `activation` is the
    accumulated error divided by the norm of the output.
    """
    pairs = {
        "weight": [(_deployed_weight_error(row), row.weight_norm) for row in rows],
        "activation": [(row.activation_error_accumulated, row.activation_norm) for row in rows if row.linear != BLOCK],
    }
    shares = {
        name: [error / norm for error, norm in each if error is not None and norm] for name, each in pairs.items()
    }
    means = {name: math.fsum(each) / len(each) for name, each in shares.items() if each}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def write_errors(path: Path, found: Mapping[str, Sequence[Errors]]) -> None:
    """Write the errors of each model as CSV, to 6 digits; what is not known stays empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["model", *(field.name for field in fields(Errors))], lineterminator="\n")
        writer.writeheader()
        for model, rows in found.items():
            for row in rows:
                writer.writerow({"model": model, **{key: _written(value) for key, value in asdict(row).items()}})


def _written(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _deployed_weight_error(row: Errors) -> float | None:
    return row.weight_error_without if row.weight_error_with is None else row.weight_error_with


def _windows(params: EvaluateParams, loaded: Loaded) -> Tensor | None:
    if not params.perplexity:
        return None
    text = next(iter(params.perplexity.values()))
    corpus = load_corpus(text.text, split="test", column=text.column, join=text.join)
    windows = consecutive_windows(tokenize(corpus.text, loaded.tokenizer), params.error_windows, text.length)
    refuse(loaded.model, windows)
    return windows


def _deployed(original: ModelStream, loaded: Loaded) -> nn.ModuleList:
    """The blocks of the quantized model, with their adapters."""
    if loaded.kind != "quantized":
        raise ApiqError(f"{loaded.folder} is a {loaded.kind} model; errors are those of a quantized one.")
    path, count = original.blocks.path, len(original.blocks.modules)
    model = unwrapped(loaded.model)
    blocks = model.get_submodule(model.config.quantization_config.blocks)
    if model.config.quantization_config.blocks != path or len(blocks) != count:
        raise ApiqError(
            f"{loaded.folder} has {len(blocks)} blocks {model.config.quantization_config.blocks} and {original.folder} "
            f"{count} blocks {path}; give the model that it was made from."
        )
    return blocks


def _start(original: ModelStream, windows: Tensor, place: torch.device) -> tuple[Activations, list[BlockCall]]:
    with original.embeddings(torch.device("cpu")) as model:
        return capture(
            model, original.blocks.modules, windows, original.dtype,
            lambda shape: choose_home("auto", shape, original.dtype, COPIES, place, work_root()),
        )  # fmt: skip


def _weights(module: nn.Module, name: str, folder: Path) -> dict[str, float]:
    W, found = module.get_parameter("weight"), linear(folder, name)
    if found.Q.shape != W.shape:
        raise ApiqError(
            f"{name} is {list(found.Q.shape)} in {folder} and {list(W.shape)} in the full-precision model; "
            "give the model that it was made from."
        )
    return weight_errors(W, found)


def _means(both: SideBySide) -> dict[str, dict[str, float]]:
    """The fields `activation_...` of `Errors`."""
    return {
        name: {
            "activation_norm": totals.norm / both.tokens,
            "activation_error_own": totals.own / both.tokens,
            "activation_error_accumulated": totals.accumulated / both.tokens,
        }
        for name, totals in both.totals.items()
    }
