"""What a run will need, as one mapping: the answer of `apiq plan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apiq.blocks.capture import BlockCall, capture
from apiq.device import pick_device, pick_dtype
from apiq.errors import ApiqError
from apiq.methods import METHODS
from apiq.params import Params
from apiq.planning import memory, shortfalls
from apiq.planning.machine import Machine, look
from apiq.planning.outline import Outline, outline, skeleton
from apiq.planning.size import Result, packed_block, result_size
from apiq.planning.step import Pass, count_head
from apiq.planning.timing import Calibration, Timing
from apiq.planning.workload import block_sizes, fitting_pass, training_pass


@dataclass(frozen=True)
class Setting:
    """A model, parameters and a machine, with what was counted of them."""

    params: Params
    outline: Outline
    result: Result
    machine: Machine
    device: torch.device
    compute: torch.dtype
    tuning_device: torch.device
    tuning_dtype: torch.dtype
    sizes: memory.BlockSizes
    fitting: Pass
    training: Pass | None
    work: Path
    out: Path


def plan(params: Params, out: str | Path = "data/quantized", timed: bool = True) -> dict[str, Any]:
    """Count and time what quantizing and finetuning with `params` would take here. No weight is read or fetched.

    Args:
        params: all sections; the model may be a folder with no more than its config.json.
        out: where the result would go: the disk of that folder is looked at.
        timed: whether to try out a random block for up to 20 seconds; without it no time is told.

    Returns:
        `model`, `result` (effective bits, bytes), `quantize` and `finetune` (bytes by part, seconds), `machine`,
        `offloaded` (what does not stay on the device) and `problems` (what does not fit, and the field to change).
        All sizes in bytes, all times in seconds.

    Raises:
        ApiqError: config.json cannot be had, or the parameters do not fit the model.
    """
    setting = _setting(params, Path(out))
    timing = _calibration(setting).run() if timed else None
    quantizing, tuning = quantizing_needs(setting), tuning_needs(setting)
    return {
        "model": _model(setting),
        "result": _result(setting.result),
        "quantize": {**quantizing, **_quantize_time(setting, timing)},
        "finetune": None if tuning is None else {**tuning, **_finetune_time(setting, timing)},
        "machine": shortfalls.told(setting.machine),
        "offloaded": shortfalls.offloaded(quantizing),
        "problems": shortfalls.problems(params, quantizing, tuning, setting.machine),
    }


def _setting(params: Params, out: Path) -> Setting:
    shapes = outline(params.model)
    _check(params, shapes)
    quantize, tune = params.quantize, params.finetune
    device, tuning_device = pick_device(quantize.device), pick_device(tune.device)
    compute, tuning_dtype = pick_dtype(quantize.dtype, device), pick_dtype(tune.dtype, tuning_device)
    block = max((block for block, _ in shapes.kinds()), key=lambda b: sum(p.numel() for p in b.parameters()))
    packed = packed_block(block, quantize, shapes.storage)
    shape = (min(quantize.batch_size, params.calibration.windows), params.calibration.length, shapes.width)
    fitting = fitting_pass(block, _call(shapes, shape[1]), quantize, shape, compute, shapes.storage, device)
    training = None
    if METHODS[quantize.method].adapted:
        batch = (tune.batch_size, tune.length, shapes.width)
        training = training_pass(packed, _call(shapes, tune.length), batch, tuning_dtype, tuning_device)
    work = Path(os.environ.get("APIQ_WORK") or ".apiq_work")
    return Setting(
        params, shapes, result_size(shapes, quantize), look(device, {"result": out, "unfinished work": work}), device,
        compute, tuning_device, tuning_dtype, block_sizes(block, packed, quantize), fitting, training, work, out,
    )  # fmt: skip


def _check(params: Params, shapes: Outline) -> None:
    if shapes.context is not None:
        for name, length in {"calibration": params.calibration.length, "finetune": params.finetune.length}.items():
            if length > shapes.context:
                raise ApiqError(
                    f"{name}.length is {length}; it should be at most {shapes.context}, the context of the model."
                )
    if METHODS[params.quantize.method].adapted:
        for block, _ in shapes.kinds():
            smallest = min(min(value.shape) for value in block.parameters() if value.dim() == 2)
            if params.quantize.rank > smallest:
                raise ApiqError(
                    f"quantize.rank is {params.quantize.rank}; it should be at most {smallest}, the smallest side "
                    "of a linear."
                )


def _call(shapes: Outline, length: int) -> BlockCall:
    model, blocks = skeleton(shapes.config)
    window = torch.zeros(1, length, dtype=torch.long)
    return capture(model, blocks.modules, window, torch.device("cpu"), torch.float32, 1)[1][0]


def quantizing_needs(setting: Setting) -> dict[str, Any]:
    """GPU memory, RAM and disk of a quantization, by part, and where the activations live."""
    params, shapes, machine = setting.params, setting.outline, setting.machine
    item = setting.compute.itemsize
    method = params.quantize.method
    weight = 4 if setting.compute == torch.float32 else shapes.storage.itemsize
    one = memory.activations(params.calibration.windows, params.calibration.length, shapes.width, item)
    copies = memory.copies_alive(method, params.quantize.second_term, setting.sizes.widest / shapes.width)
    sets = int(one * copies)
    solver = memory.solver(setting.sizes, setting.fitting, weight, METHODS[method].calibrated)
    home = memory.home(sets, machine.gpu, sum(solver.values()))
    outside = sum(value.nbytes for value in shapes.outside().values())
    host = memory.host(shapes.parameters(), outside, weight)
    ram, gpu = dict(host), None
    (ram if home == "ram" else {}).update({"activations": sets})
    if machine.gpu is None:
        ram |= solver
    else:
        gpu = solver | ({"activations": sets} if home == "gpu" else {})
    adapters = setting.result.adapter
    disk = {
        "result": setting.result.total,
        "unfinished work": memory.work_folder(
            setting.result.packed, adapters, one if METHODS[method].calibrated else 0
        ),
    }
    return {"gpu": gpu, "ram": {**ram, "interpreter": machine.interpreter}, "disk": disk, "activations": home}


def tuning_needs(setting: Setting) -> dict[str, Any] | None:
    """GPU memory and RAM of finetuning, by part; None where there are no adapters to train."""
    params, shapes, work = setting.params.finetune, setting.outline, setting.training
    if work is None:
        return None
    item, tokens = setting.tuning_dtype.itemsize, params.batch_size * params.length
    outside = sum(value.numel() for value in shapes.outside().values())
    entries = int(shapes.config.get_text_config().vocab_size)
    head = count_head(tokens, entries, shapes.width, setting.tuning_dtype, setting.tuning_device)
    parts = memory.training(
        sum(setting.result.blocks), outside, item, setting.result.trained, work, len(shapes.blocks.modules),
        tokens * shapes.width * 4, head, params.activation_checkpointing, memory.DEQUANTIZED * setting.sizes.largest,
    )  # fmt: skip
    loaded = {"interpreter": setting.machine.interpreter}
    if setting.machine.gpu is None or setting.tuning_device.type == "cpu":
        return {"gpu": None, "ram": {**parts, **loaded}}
    return {"gpu": parts, "ram": {"loading": parts["packed model"], **loaded}}


def _calibration(setting: Setting) -> Calibration:
    params = setting.params
    return Calibration(
        setting.outline, params.quantize,
        (min(params.quantize.batch_size, params.calibration.windows), params.calibration.length),
        params.calibration.windows, params.finetune, setting.device, setting.compute, setting.tuning_dtype,
        setting.work, setting.fitting, setting.training,
    )  # fmt: skip


def _quantize_time(setting: Setting, timing: Timing | None) -> dict[str, Any]:
    if timing is None:
        return {}
    params = setting.params
    batches = -(-params.calibration.windows // params.quantize.batch_size)
    seconds = timing.costs.block(batches, params.quantize.epochs) * len(setting.outline.blocks.modules)
    return {
        "seconds": seconds * timing.slowdown,
        "cpu_seconds": seconds if setting.device.type == "cpu" else None,
        "uncertainty": timing.costs.spread,
        "seconds_per_step": timing.costs.step,
        "trial": {"windows": timing.costs.shape[0], "length": timing.costs.shape[1],
                  "narrower": timing.costs.narrower, "seconds": timing.seconds},
    }  # fmt: skip


def _finetune_time(setting: Setting, timing: Timing | None) -> dict[str, Any]:
    if timing is None or timing.tuning is None:
        return {}
    params = setting.params.finetune
    return {
        "seconds_per_step": timing.tuning * params.accumulation * timing.slowdown,
        "tokens_per_second": params.batch_size * params.length / (timing.tuning * timing.slowdown),
        "uncertainty": timing.costs.spread,
    }


def _model(setting: Setting) -> dict[str, Any]:
    shapes = setting.outline
    return {
        "source": setting.params.model.source,
        "kind": type(shapes.model).__name__,
        "parameters": shapes.parameters(),
        "quantized_weights": setting.result.bits.weights,
        "blocks": len(shapes.blocks.modules),
        "width": shapes.width,
        "bytes": shapes.parameters() * shapes.storage.itemsize,
    }


def _result(result: Result) -> Mapping[str, Any]:
    return {
        "effective_bits": result.bits.total,
        "bits": result.bits.as_dict(),
        "bytes": result.total,
        "weights_bytes": result.packed,
        "adapter_bytes": result.adapter,
        "adapter_parameters": result.trained,
    }
