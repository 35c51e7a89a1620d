"""From what was counted of a model to what each place must hold: GPU, RAM and disk, by part."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apiq.blocks.activations import TOKENS
from apiq.blocks.walk import COPIES
from apiq.device import pick_device, pick_dtype
from apiq.grids.compiled import MANY
from apiq.methods.descent import steps
from apiq.params import Params
from apiq.planning import memory
from apiq.planning.machine import Machine
from apiq.planning.outline import Outline
from apiq.planning.size import Result
from apiq.planning.step import Pass, count_head, count_predictions
from apiq.refinement.teacher import COPIES as TEACHER_COPIES
from apiq.refinement.teacher import LOGITS

TOKEN = 8
"""Bytes of a token in the windows that refinement keeps."""
MODEL = "full-precision model"


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
    passing: int
    training: Pass | None
    refining_device: torch.device
    refining: Pass | None
    teaching: int
    """Bytes alive when windows pass through a full-precision block in refinement; 0 without it."""
    work: Path

    @property
    def swept(self) -> int:
        """Weights of the largest block times optimizer steps; what a CPU compiles depends on it."""
        quantize = self.params.quantize
        if quantize.method not in memory.FITTED:
            return 0
        return self.sizes.weights * steps(self.params.calibration.windows, quantize)


def weight_bytes(compute: torch.dtype, storage: torch.dtype) -> int:
    """Bytes of a weight in a block that is being quantized: only float32 arithmetic asks for float32 weights."""
    return 4 if compute == torch.float32 else storage.itemsize


def quantizing_needs(setting: Setting) -> dict[str, Any]:
    """GPU memory, RAM and disk of a quantization, by part, and where the activations live."""
    params, shapes, machine = setting.params, setting.outline, setting.machine
    item = setting.compute.itemsize
    method = params.quantize.method
    weight = weight_bytes(setting.compute, shapes.storage)
    one = memory.activations(params.calibration.windows, params.calibration.length, shapes.width, item)
    copies = memory.copies_alive(method, params.quantize.second_term, setting.sizes.widest / shapes.width)
    surveyed = params.quantize.fisher
    reckoned = len(shapes.blocks.modules) + 2 if surveyed else COPIES
    sets = int(one * (max(copies, reckoned) if surveyed else copies))
    solver = memory.solver(method, setting.sizes, setting.fitting, setting.passing, weight)
    if surveyed:
        solver["gradients"] = 2 * memory.FLOAT * setting.sizes.weights
    home = memory.home(params.quantize.activations, reckoned * one, machine.gpu, machine.ram)
    embeddings = weight * sum(value.numel() for value in shapes.outside().values())
    gpu, at_work = (None, dict(solver)) if machine.gpu is None else (dict(solver), {})
    if home == "gpu" and gpu is not None:
        gpu["activations"] = sets
    elif home == "ram":
        at_work["activations"] = sets
    if gpu is None and setting.swept >= MANY:
        at_work["compiler"] = memory.COMPILER
    if gpu is None and platform.libc_ver()[0] == "glibc":
        length = params.calibration.length
        tokens = min(params.calibration.windows * length, max(length, TOKENS))
        pieces = {
            "block": weight * setting.sizes.largest,
            "step": 4 * tokens * setting.sizes.widest,
            "activations": one,
        }
        small = sum(size for part, size in at_work.items() if pieces.get(part, 0) < memory.SMALL)
        at_work["kept by the allocator"] = memory.allocator(small, setting.sizes, weight, len(shapes.blocks.modules))
    ram = memory.host(at_work, embeddings, one if home == "ram" else 0)
    written = memory.work_folder(setting.result.packed, setting.result.adapter, one, sets if home == "disk" else 0)
    disk = {"result": setting.result.total, "unfinished work": written}
    return {"gpu": gpu, "ram": {**ram, "interpreter": machine.interpreter}, "disk": disk, "activations": home}


def tuning_needs(setting: Setting) -> dict[str, Any] | None:
    """GPU memory and RAM of finetuning, by part; None where there are no adapters to train."""
    if setting.training is None:
        return None
    params = setting.params.finetune
    tokens = params.batch_size * params.length
    return _training_needs(
        setting, setting.training, tokens, setting.tuning_dtype, setting.tuning_device,
        params.activation_checkpointing, memory.STATES[params.optimizer],
    )  # fmt: skip


def refining_needs(setting: Setting) -> dict[str, Any] | None:
    """GPU memory, RAM and disk of refinement, by part, and where the activations live; None where there is none.

    Each place has to hold the worse of two moments: the full-precision model is asked, or the adapters are trained.
    The predictions of that model lie in RAM, and with its hidden states and the unfinished work on disk.
    """
    if setting.refining is None:
        return None
    params, calibration, device = setting.params.refine, setting.params.calibration, setting.refining_device
    dtype, again = pick_dtype(params.dtype, device), params.activation_checkpointing
    again = device.type == "cuda" if again == "auto" else again
    entries = int(setting.outline.config.get_text_config().vocab_size)
    windows = calibration.windows * (1 + params.generated)
    kept = min(params.top_k, entries)
    each = memory.FLOAT * kept * (1 if kept == entries else 2)
    tokens = min(params.batch_size, windows) * calibration.length
    needs = _training_needs(setting, setting.refining, tokens, dtype, device, bool(again), memory.STATES["adamw"])
    scales = setting.sizes.groups * len(setting.outline.blocks.modules) if params.lr_scales else 0
    guard = 3 * memory.FLOAT * (setting.result.trained + scales)
    optimizer = (2 * memory.FLOAT + memory.STATES["adamw"]) * scales
    (needs["gpu"] or needs["ram"])["adapters and optimizer"] += guard + optimizer
    needs["ram"]["predictions"] = windows * calibration.length * each
    asking = _asking_needs(setting, needs, windows, dtype)
    hidden = setting.outline.width * dtype.itemsize if params.hidden_weight else 0
    kept = windows * calibration.length * (each + hidden) + 2 * guard
    size, work = setting.result.total, windows * calibration.length * TOKEN + max(kept, asking["mapped"])
    disk = {"quantized model": size, "result": size, "unfinished work": work}
    gpu = needs["gpu"] and memory.worse(asking["gpu"], needs["gpu"])
    return {"gpu": gpu, "ram": memory.worse(asking["ram"], needs["ram"]), "disk": disk, "activations": asking["home"]}


def _asking_needs(setting: Setting, training: dict[str, Any], windows: int, dtype: torch.dtype) -> dict[str, Any]:
    """What refinement holds beside the packed model while the full-precision model predicts `windows`, by part.

    That is the worse of two moments: windows pass through a block, or what lies outside the blocks makes predictions
    of what the last block gave. These are in RAM twice, in pieces and as a whole.

    Args:
        setting: what was counted.
        training: what the training holds, with the packed model and the predictions.
        windows: those of the calibration and generated ones.
        dtype: the arithmetic.
    """
    shapes, machine, params = setting.outline, setting.machine, setting.params
    length, on_gpu = params.calibration.length, training["gpu"] is not None
    packed = training["gpu" if on_gpu else "ram"]["packed model"]
    free_gpu, free_ram = (machine.gpu, machine.ram) if on_gpu else (None, machine.ram - packed)
    sets = TEACHER_COPIES * memory.activations(windows, length, shapes.width, dtype.itemsize)
    home = memory.home("auto", sets, None if free_gpu is None else free_gpu - packed, free_ram)
    weight = weight_bytes(dtype, shapes.storage)
    outside = weight * sum(value.numel() for value in shapes.outside().values())
    entries = int(shapes.config.get_text_config().vocab_size)
    stored = dtype if weight == memory.FLOAT else shapes.storage
    logits = count_predictions(
        min(max(LOGITS // (memory.FLOAT * entries), 1), windows * length), entries, shapes.width, params.refine.top_k,
        stored, dtype, setting.refining_device,
    )  # fmt: skip
    loaded = {"packed model": packed, "adapters": setting.result.adapter}
    through = {**loaded, "block": weight * setting.sizes.weights, "step": setting.teaching}
    last = {**loaded, "outside the blocks": outside, "logits": logits}
    told = {"predictions": 2 * training["ram"]["predictions"], "interpreter": machine.interpreter}
    gpu = None
    if on_gpu:
        gpu, ram = memory.worse(through, last), told
    else:
        ram = memory.worse({**through, "interpreter": machine.interpreter}, {**last, **told})
    if home != "disk":
        (gpu if home == "gpu" and gpu is not None else ram)["activations"] = sets
    return {"gpu": gpu, "ram": ram, "home": home, "mapped": sets if home == "disk" else 0}


def evaluating_needs(setting: Setting) -> dict[str, Any]:
    """GPU memory and RAM of the largest model that is measured, by part: the full-precision one, loaded whole."""
    params, machine = setting.params.evaluate, setting.machine
    device = pick_device(params.device)
    model = {MODEL: setting.outline.parameters() * pick_dtype(params.dtype, device).itemsize}
    loaded = {"interpreter": machine.interpreter}
    if machine.gpu is None or device.type == "cpu":
        return {"gpu": None, "ram": {**model, **loaded}}
    return {"gpu": model, "ram": loaded}


def _training_needs(
    setting: Setting, work: Pass, tokens: int, dtype: torch.dtype, device: torch.device, checkpointing: bool,
    moments: int,
) -> dict[str, Any]:  # fmt: skip
    """GPU memory and RAM of training the adapters of the packed model on batches of `tokens`."""
    shapes = setting.outline
    outside = sum(value.numel() for value in shapes.outside().values())
    entries = int(shapes.config.get_text_config().vocab_size)
    head = count_head(tokens, entries, shapes.width, dtype, device)
    parts = memory.training(
        sum(setting.result.blocks), outside, dtype.itemsize, setting.result.trained, moments, work,
        len(shapes.blocks.modules), tokens * shapes.width * 4, head, checkpointing,
        memory.DEQUANTIZED * setting.sizes.largest,
    )  # fmt: skip
    loaded = {"interpreter": setting.machine.interpreter}
    if setting.machine.gpu is None or device.type == "cpu":
        if platform.libc_ver()[0] == "glibc":
            loaded["kept by the allocator"] = memory.KEPT_TRAINING * setting.sizes.small * memory.FLOAT
        return {"gpu": None, "ram": {**parts, **loaded}}
    return {"gpu": parts, "ram": {"loading": parts["packed model"], **loaded}}
