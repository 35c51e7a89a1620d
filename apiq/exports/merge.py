"""`apiq merge`: adapters into the weights, in full precision exactly, or back into a few bits at a stated loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from apiq.checkpoint import manifest
from apiq.errors import ApiqError
from apiq.exports.merging import write_merged
from apiq.exports.rules import one_grid, require_uniform
from apiq.exports.run import precision_of, summary
from apiq.exports.source import Source, open_source
from apiq.files import new_folder
from apiq.method_params import WITHOUT_ADAPTERS
from apiq.outputs import require_place
from apiq.params import QuantizeParams, parse
from apiq.progress import Progress, silent
from apiq.work import alone, forget, work_folder


def merge(folder: str | Path, out: str | Path, dtype: str = "auto") -> dict[str, Any]:
    """Write the model of a quantized or finetuned folder to `out` with its adapters inside the dense weights.

    Each weight is Q plus what PEFT's merge adds to it, in float32, rounded once to `dtype` (auto: that of the
    checkpoint): in float32 the model computes what it computed with the adapter beside.

    Returns:
        `dtype`, `linears`, `bytes`, `out`.

    Raises:
        ApiqError: the folder has no adapters, or such as are no change of a weight, or its linears have no tensor of
            their own.
    """
    source = open_source(folder)
    require_place(out, folder, source.folder)
    precision = precision_of(dtype, source.dtype)
    with new_folder(out) as new:
        write_merged(source, new, precision)
    return summary(source, precision, Path(out))


def requantize(
    folder: str | Path,
    out: str | Path,
    text: Tensor,
    method: str = "rtn",
    windows: Tensor | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Merge the adapters, then quantize anew on the grid of the checkpoint, and say what that costs.

    The sum Q + A B^T does not lie on the grid, so it is rounded again: by rounding to nearest, or by another method
    without adapters on calibration `windows` (n, length).

    It is merged in the precision of the checkpoint.

    Args:
        folder: a quantized or finetuned folder.
        out: the quantized folder that is written, without adapters.
        text: token windows (n, length) for the perplexity before and after.
        method: rtn, gptq, awq or omniquant.
        windows: calibration windows for the methods that need them.
        progress: told after every block and every window.

    Returns:
        `perplexity_before` and `perplexity_after`, and what `apiq.quantize` returns.

    Raises:
        ApiqError: as `merge`, or the method would fit adapters again, or lacks its windows, or a window is longer than
            the context of the model: all of it before the first hour is spent.
    """
    from apiq.checkpoint.loading import load
    from apiq.evaluation.perplexity import perplexity
    from apiq.quantization import quantize

    source = open_source(folder)
    require_place(out, folder, source.folder)
    params = _params(source, method)
    _require_fit(source, text, windows, params)
    with alone(work_folder({"merge": manifest.verify(folder)["files"], "base": source.index})) as work:
        if not (work / "merged").exists():
            with new_folder(work / "merged") as new:
                write_merged(source, new, source.dtype)
        before = perplexity(load(folder).model, text, progress=progress)
        result = quantize(work / "merged", windows, params, out, progress)
        forget(work)
    after = perplexity(load(out).model, text, progress=progress)
    return {"perplexity_before": before, "perplexity_after": after, **result}


def _require_fit(source: Source, text: Tensor, windows: Tensor | None, params: QuantizeParams) -> None:
    """Refuse what scoring and quantizing would refuse later, at the cost of a look at the model without its weights."""
    from apiq.evaluation.perplexity import context_length, refuse

    refuse(source.model, text)
    if windows is None:
        if params.calibrated:
            raise ApiqError(f"method {params.method} needs calibration windows; give --calibration, or use rtn.")
        return
    context, length = context_length(source.model), windows.shape[1]
    if context is not None and length > context:
        raise ApiqError(
            f"calibration.length is {length}; it must be at most {context}, the context of the model: "
            f"give -S calibration.length={context}."
        )


def _params(source: Source, method: str) -> QuantizeParams:
    """How the merged model is quantized: on the grid of the checkpoint, without adapters."""
    if method not in WITHOUT_ADAPTERS:
        raise ApiqError(f"method is {method!r}; to quantize a merged model again it should be {_names()}.")
    require_uniform(source, f"method {method}")
    grid = one_grid(source, f"method {method}")
    kept = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    return parse({"quantize": {"method": method, **kept}}).quantize


def _names() -> str:
    return ", ".join(sorted(WITHOUT_ADAPTERS))
