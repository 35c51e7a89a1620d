"""What a run will need, as one mapping: the answer of `apiq plan`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apiq.adapters.configuration import resolved
from apiq.adapters.targets import largest
from apiq.adapters.targets import shapes as linear_shapes
from apiq.blocks.activations import TOKENS
from apiq.blocks.architecture import linears
from apiq.blocks.capture import BlockCall
from apiq.checks import check_quantize
from apiq.device import pick_device, pick_dtype, solver_dtype
from apiq.errors import ApiqError
from apiq.methods import build
from apiq.params import Params
from apiq.planning import shortfalls
from apiq.planning.machine import look
from apiq.planning.needs import Setting, evaluating_needs, quantizing_needs, refining_needs, tuning_needs, weight_bytes
from apiq.planning.outline import Outline, block_calls, outline, probe
from apiq.planning.size import PackedBlock, Result, packed_block, result_size
from apiq.planning.step import Pass
from apiq.planning.timing import Calibration, Timing
from apiq.planning.workload import block_sizes, fitting_pass, passing, teaching_pass, training_pass


def plan(params: Params, out: str | Path = "data/quantized", timed: bool = True) -> dict[str, Any]:
    """Count and time what quantizing, refining, finetuning and evaluating would take here. No weight is read.

    Args:
        params: all sections; the model may be a folder with no more than its config.json.
        out: where the result would go: the disk of that folder is looked at.
        timed: whether to try out a random block for up to 20 seconds; without it no time is told.

    Returns:
        `model`, `result` (effective bits, bytes), `quantize`, `refine` and `finetune` (bytes by part, seconds),
        `evaluate` (bytes by part), `machine`, `offloaded` (what does not stay on the device) and `problems` (what
        does not fit, and the field to change).
        All sizes in bytes, all times in seconds.

    Raises:
        ApiqError: config.json cannot be had, or the parameters do not fit the model.
    """
    setting = _setting(params, Path(out))
    timing = _calibration(setting).run() if timed else None
    quantizing, refining, tuning = quantizing_needs(setting), refining_needs(setting), tuning_needs(setting)
    evaluating = evaluating_needs(setting)
    return {
        "model": _model(setting),
        "result": _result(setting.result),
        "quantize": {**quantizing, **_quantize_time(setting, timing)},
        "refine": None if refining is None else {**refining, **_refine_time(setting, timing)},
        "finetune": None if tuning is None else {**tuning, **_finetune_time(setting, timing)},
        "evaluate": evaluating,
        "machine": shortfalls.told(setting.machine),
        "offloaded": shortfalls.offloaded(quantizing, refining),
        "problems": shortfalls.problems(params, quantizing, refining, tuning, evaluating, setting.machine),
    }


def _setting(params: Params, out: Path) -> Setting:
    shapes = outline(params.model)
    params = _fitting(params, shapes)
    quantize, tune = params.quantize, params.finetune
    device, tuning_device = pick_device(quantize.device), pick_device(tune.device)
    weights = largest([linear_shapes(linears(block)) for block, _ in shapes.kinds()])
    compute, tuning_dtype = solver_dtype(quantize.dtype, device, weights), pick_dtype(tune.dtype, tuning_device)
    block = max((block for block, _ in shapes.kinds()), key=lambda b: sum(p.numel() for p in b.parameters()))
    packed = packed_block(block, quantize, shapes.storage)
    shape = (min(quantize.batch_size, params.calibration.windows), params.calibration.length, shapes.width)
    call = _call(shapes, shape[1])
    fitting = fitting_pass(block, call, quantize, shape, compute, shapes.storage, device)
    many = (min(max(TOKENS // shape[1], shape[0]), params.calibration.windows), *shape[1:])
    through = passing(block, call, quantize, many, compute, shapes.storage, device)
    training = None
    if build(quantize).adapted and tune.task != "none":
        batch = (tune.batch_size, tune.length, shapes.width)
        training = training_pass(packed, _call(shapes, tune.length), batch, tuning_dtype, tuning_device)
    refining_device = pick_device(params.refine.device)
    refining, teaching = _refining(params, block, packed, call, shapes, refining_device)
    weight = weight_bytes(compute, shapes.storage)
    work = Path(os.environ.get("APIQ_WORK") or ".apiq_work")
    return Setting(
        params, shapes, result_size(shapes, quantize), look(device, {"result": out, "unfinished work": work}), device,
        compute, tuning_device, tuning_dtype, block_sizes(block, packed, quantize, weight), fitting, through,
        training, refining_device, refining, teaching, work,
    )  # fmt: skip


def _refining(
    params: Params, block: nn.Module, packed: PackedBlock, call: BlockCall, shapes: Outline, device: torch.device
) -> tuple[Pass | None, int]:
    """A step of refinement, and the bytes alive while the full-precision model is asked; None and 0 without it."""
    refine, length = params.refine, params.calibration.length
    if not refine.epochs or not (packed.adapters or refine.lr_scales):
        return None, 0
    dtype = pick_dtype(refine.dtype, device)
    training = training_pass(packed, call, (refine.batch_size, length, shapes.width), dtype, device)
    asked = min(max(TOKENS // length, 1), params.calibration.windows * (1 + refine.generated))
    weights = dtype if dtype == torch.float32 else shapes.storage
    return training, teaching_pass(block, call, (asked, length, shapes.width), weights, dtype, device)


def _fitting(params: Params, shapes: Outline) -> Params:
    """The parameters with the linears spelled out that are to carry adapters, once they fit the model."""
    if shapes.context is not None:
        lengths = {"calibration": params.calibration.length}
        if params.finetune.task != "none":
            lengths["finetune"] = params.finetune.length
        lengths |= {f"evaluate.perplexity.{name}": text.length for name, text in params.evaluate.perplexity.items()}
        for name, length in lengths.items():
            if length > shapes.context:
                raise ApiqError(
                    f"{name}.length is {length}; it should be at most {shapes.context}, the context of the model."
                )
    check_quantize(params.quantize, shapes.config.to_dict())
    if not build(params.quantize).adapted:
        return params
    found = [linear_shapes(linears(block)) for block in shapes.blocks.modules]
    return params.model_copy(update={"quantize": resolved(params.quantize, found)})


def _call(shapes: Outline, length: int) -> BlockCall:
    model, blocks = probe(shapes.config)
    return block_calls(model, blocks, length, torch.device("cpu"))[0]


def _calibration(setting: Setting) -> Calibration:
    params = setting.params
    return Calibration(
        setting.outline, params.quantize,
        (min(params.quantize.batch_size, params.calibration.windows), params.calibration.length),
        params.calibration.windows, params.finetune, setting.device, setting.compute, setting.tuning_dtype,
        setting.work, setting.fitting, setting.training, setting.swept,
    )  # fmt: skip


def _quantize_time(setting: Setting, timing: Timing | None) -> dict[str, Any]:
    if timing is None:
        return {}
    params = setting.params
    windows, size = params.calibration.windows, params.quantize.batch_size
    aside = math.ceil(params.quantize.held_out * windows)
    passed, stepped = math.ceil(windows / size), math.ceil((windows - aside) / size)
    seconds = timing.costs.block(passed, stepped, params.quantize.epochs) * len(setting.outline.blocks.modules)
    return {
        "seconds": seconds * timing.slowdown,
        "cpu_seconds": seconds if setting.device.type == "cpu" else None,
        "uncertainty": timing.costs.spread,
        "seconds_per_step": timing.costs.step,
        "trial": {"windows": timing.costs.shape[0], "length": timing.costs.shape[1],
                  "narrower": timing.costs.narrower, "seconds": timing.seconds},
    }  # fmt: skip


def _refine_time(setting: Setting, timing: Timing | None) -> dict[str, Any]:
    """The time of the training part; what the quantized model writes, and the full-precision one says, comes first."""
    if timing is None or timing.tuning is None:
        return {}
    refine, windows, tune = setting.params.refine, setting.params.calibration, setting.params.finetune
    tokens = refine.epochs * windows.windows * (1 + refine.generated) * windows.length
    each = timing.tuning / (tune.batch_size * tune.length)
    return {"seconds": tokens * each * timing.slowdown, "uncertainty": max(0.3, timing.costs.spread)}


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
