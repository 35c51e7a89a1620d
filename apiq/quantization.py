"""From a full-precision model to a checkpoint folder: load, walk, write."""

from __future__ import annotations

import contextlib
import copy
import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apiq import parallel
from apiq.adapters.configuration import model_config, resolved
from apiq.adapters.injection import model_state, ranks_of
from apiq.adapters.targets import Shapes, largest, shapes
from apiq.adapters.tuners import TUNERS
from apiq.blocks.architecture import linears
from apiq.blocks.capture import PADDING
from apiq.blocks.store import BlockStore
from apiq.blocks.unfuse import require_covered, unfuse
from apiq.blocks.walk import Walk
from apiq.checkpoint import manifest
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.card import card
from apiq.checkpoint.carried import carry
from apiq.checkpoint.grid_config import grid_entries, grid_of
from apiq.checkpoint.layout import REST, block_file
from apiq.checkpoint.loading import FullPrecision, full_precision
from apiq.checkpoint.original import content, remember
from apiq.checkpoint.writing import write_adapter, write_index, write_rest
from apiq.device import pick_device, solver_dtype
from apiq.errors import ApiqError
from apiq.files import new_folder, read_json, write_json, write_text
from apiq.meter import Meter
from apiq.methods import build
from apiq.outputs import require_place
from apiq.params import QuantizeParams
from apiq.progress import Progress, silent
from apiq.work import alone, code_version, fingerprint, forget, work_folder


def quantize(
    source: str | Path, windows: Tensor | None, params: QuantizeParams, out: str | Path, progress: Progress = silent
) -> dict[str, Any]:
    """Quantize the model in `source` on calibration `windows` (n, length) and write the checkpoint to `out`.

    A killed run is taken up at the block it was in by the same call; finished blocks wait in
    `$APIQ_WORK` or `.apiq_work/`. The folder `out` appears whole or not at all.

    Returns:
        `effective_bits` in all and `bits` by part, `blocks` with the mean squared error of each block's
        output before and after (`loss_first`, `loss_last`), `unreached` linears where there are any, `seconds`,
        `cpu_seconds`, `peak_memory_mb`.

    Raises:
        ApiqError: the model, the windows and the parameters do not fit together, a weight or a loss is
            not finite, a file is damaged, or `out` cannot be written without loss.
    """
    meter = Meter()
    device = parallel.join(pick_device(params.device))
    method = build(params)
    _check_windows(windows, params, method.calibrated)
    own, part = (None, params.batch_size) if windows is None else parallel.share(windows, params.batch_size)
    original = full_precision(source)
    require_place(out, original.folder)
    found = [shapes(linears(block)) for block in _unfused(original)]
    compute = solver_dtype(params.dtype, device, largest(found))
    if compute == torch.float32:
        original = full_precision(source, torch.float32)
    union = {name: shape for block in found for name, shape in block.items()}
    _check_fit(original, windows, union, params)
    spelled = resolved(params, found) if method.adapted else params
    solved = spelled.model_copy(update={"batch_size": part})
    identity = _identity(original.folder, windows, params, device, compute)
    folder = work_folder(identity)
    with alone(folder) if parallel.rank() == 0 else contextlib.nullcontext(folder) as work:
        store = BlockStore(work)
        spent = store.cpu_seconds
        Walk(
            original.stream, own, build(solved), solved, device, compute, original.dtype, store, progress,
            lambda: spent + meter.reading()["cpu_seconds"],
        ).run()  # fmt: skip
        if parallel.rank() == 0:
            with new_folder(out) as folder:
                _write(folder, original, store, union, spelled, method.adapted)
                manifest.write(folder, "quantized", **_facts(params, windows, identity))
                write_text(folder / "README.md", card(folder))
            remember(identity["model"], original.folder)
            forget(work)
        parallel.wait()
    metrics, cost = read_json(Path(out) / "metrics.json"), meter.reading()
    return {**metrics, **cost, "cpu_seconds": round(cost["cpu_seconds"] + spent, 3), "out": str(out)}


def _write(
    folder: Path, original: FullPrecision, store: BlockStore, union: Shapes, params: QuantizeParams, adapted: bool
) -> None:
    """Write the checkpoint of finished work to `folder`."""
    blocks = original.stream.blocks
    files = [block_file(index) for index in range(len(blocks.modules))]
    for file in files:
        shutil.copy2(store.folder / file, folder / file)
    with original.stream.rest() as model:
        write_rest(folder / REST, model, blocks.path, original.dtype)
    write_index(folder, [*files, REST], _shapes(store))
    _write_config(original, folder, list(union), store)
    if adapted:
        task = "CAUSAL_LM" if original.stream.model.can_generate() else None
        _write_adapters(store, folder, blocks.path, union, params, task)
    _write_losses(store, folder / "losses.csv")
    write_json(folder / "metrics.json", _metrics(store, folder, params))


def _unfused(original: FullPrecision) -> Iterator[nn.Module]:
    """The blocks, without data, all of whose weights are linears."""
    blocks = original.stream.blocks
    for index, block in enumerate(blocks.modules):
        plain = unfuse(copy.deepcopy(block))
        require_covered(plain, f"{blocks.path}.{index}")
        yield plain


def _check_windows(windows: Tensor | None, params: QuantizeParams, calibrated: bool) -> None:
    if calibrated and windows is None:
        raise ApiqError(
            f"quantize.method is {params.method}, which needs calibration windows; give --calibration, or use rtn."
        )
    if windows is not None and (windows.dim() != 2 or windows.is_floating_point() or not (windows != PADDING).any()):
        raise ApiqError(
            f"the calibration windows are {windows.dtype} of shape {tuple(windows.shape)}; they must be token ids of "
            "shape (windows, length), and hold at least one token."
        )
    if parallel.size() > 1 and params.held_out:
        raise ApiqError(
            f"quantize.held_out is {params.held_out}; it must be 0 with several processes: each holds its own windows."
        )


def _check_fit(original: FullPrecision, windows: Tensor | None, linears: Shapes, params: QuantizeParams) -> None:
    model = original.stream.model
    widest = max(columns for _, columns in linears.values())
    if params.target_bits is None and params.group_size > widest:
        raise ApiqError(
            f"quantize.group_size is {params.group_size}; it must be at most {widest}, the widest row of a linear, or "
            "0 for one group a row."
        )
    if windows is None:
        return
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and 0 < context < windows.shape[1]:
        raise ApiqError(
            f"calibration.length is {windows.shape[1]}; it must be at most {context}, the context of the model."
        )
    rows = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    unknown = windows[(windows >= rows) | ((windows < 0) & (windows != PADDING))]
    if unknown.numel():
        raise ApiqError(
            f"the calibration windows hold token {int(unknown[0])}, the model knows {rows}: "
            "they were made with another tokenizer."
        )


def _deciding(params: QuantizeParams) -> dict[str, Any]:
    """The parameters on which the result depends."""
    return params.model_dump(mode="json", exclude={"activations"})


def _facts(params: QuantizeParams, windows: Tensor | None, identity: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of the run."""
    seen = None if windows is None else {"windows": len(windows), "length": windows.shape[1]}
    made = {"method": params.method, "parameters": _deciding(params), "fingerprint": fingerprint(identity)}
    return made | {"calibration": seen if params.calibrated else None, "original": fingerprint(identity["model"])}


def _identity(
    folder: Path, windows: Tensor | None, params: QuantizeParams, device: torch.device, compute: torch.dtype
) -> dict[str, Any]:
    digest = None if windows is None else fingerprint({"windows": windows.tolist()})
    return {
        "model": content(folder),
        "windows": digest,
        "parameters": _deciding(params),
        "device": device.type,
        "compute": str(compute),
        "code": code_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": parallel.size(),
    }


def _write_config(original: FullPrecision, folder: Path, names: list[str], store: BlockStore) -> None:
    grids = {name: grid_of(grid) for record in store.records for name, grid in record["grids"].items()}
    original.stream.model.config.save_pretrained(folder)
    config = read_json(folder / "config.json")
    config["dtype"] = str(original.dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "apiq",
        "format": manifest.FORMAT,
        **grid_entries(grids),
        "blocks": original.stream.blocks.path,
        "linears": names,
    }
    write_json(folder / "config.json", config)
    carry(original.folder, folder, getattr(original.stream.model, "generation_config", None))
    if original.tokenizer is not None:
        original.tokenizer.save_pretrained(folder)


def _write_adapters(
    store: BlockStore, folder: Path, path: str, linears: Shapes, params: QuantizeParams, task: str | None
) -> None:
    state = model_state(path, store.adapters(), TUNERS[params.adapter])
    config = model_config(params, linears, path, ranks_of(state, params))
    write_adapter(folder / "adapter", state, config, task)


def _metrics(store: BlockStore, folder: Path, params: QuantizeParams) -> dict[str, Any]:
    bits = effective_bits(folder).as_dict()
    blocks = [{key: record[key] for key in ("name", "loss_first", "loss_last")} for record in store.records]
    unreached = [name for record in store.records for name in record["unreached"]]
    return {
        "method": params.method,
        "effective_bits": bits["total"],
        "bits": bits,
        "blocks": blocks,
        **({"unreached": unreached} if unreached else {}),
    }


def _shapes(store: BlockStore) -> dict[str, list[int]]:
    return {name: shape for record in store.records for name, shape in record["shapes"].items()}


def _write_losses(store: BlockStore, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["block", "name", "epoch", "loss"])
        for index, record in enumerate(store.records):
            for curve in record["curves"]:
                rows.writerows([index, curve["name"], epoch, _cell(loss)] for epoch, loss in enumerate(curve["losses"]))


def _cell(loss: float | None) -> str:
    """A loss, or nothing for one that was not finite."""
    return "" if loss is None else repr(loss)
