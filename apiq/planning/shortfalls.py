"""What does not fit this machine, and which field to change to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.filesize import decimal

from apiq.checkpoint.spreading import SHARE
from apiq.params import Params
from apiq.planning.machine import Machine
from apiq.planning.needs import MODEL

PLACES = {"quantized model": "result"}
"""The folder in which a part lies, where it has another name; refinement reads the one beside which it writes."""
FIELDS = {
    "result": "--out",
    "unfinished work": "the environment variable APIQ_WORK",
    "both": "--out or the environment variable APIQ_WORK",
}
"""What moves that which lies on a disk to another."""


def told(machine: Machine) -> dict[str, Any]:
    """The machine as a mapping."""
    return asdict(machine)


def offloaded(quantizing: Mapping[str, Any], refining: Mapping[str, Any] | None) -> list[str]:
    """What of a quantization and a refinement does not stay on the device."""
    told = _offloaded(quantizing)
    if refining is not None and refining["activations"] == "disk":
        told.append("in refinement the activations of the full-precision model live in files in the unfinished work")
    return told


def _offloaded(quantizing: Mapping[str, Any]) -> list[str]:
    mapped = "the activations live in files beside the unfinished work"
    if quantizing["gpu"] is None:
        return [mapped] if quantizing["activations"] == "disk" else []
    told = ["the model stays on disk, one block at a time is on the GPU"]
    if quantizing["activations"] == "ram":
        told.append(f"the activations ({decimal(quantizing['ram']['activations'])}) live in pinned RAM")
    if quantizing["activations"] == "disk":
        told.append(mapped)
    return told


def problems(
    params: Params,
    quantizing: Mapping[str, Any],
    refining: Mapping[str, Any] | None,
    tuning: Mapping[str, Any] | None,
    evaluating: Mapping[str, Any],
    machine: Machine,
) -> list[str]:
    """One sentence for each place that is too small."""
    found = [_quantizing_ram(params, quantizing["ram"], machine), _quantizing_gpu(params, quantizing["gpu"], machine)]
    found += _disks("quantizing", quantizing["disk"], machine)
    if refining is not None:
        found += [_refining(params, refining["ram"], machine.ram + machine.interpreter, "RAM"),
                  _refining(params, refining["gpu"], machine.gpu, "GPU memory"),
                  *_disks("refining", refining["disk"], machine)]  # fmt: skip
    if tuning is not None:
        found += [_tuning(params, tuning["ram"], machine.ram + machine.interpreter, "RAM"),
                  _tuning(params, tuning["gpu"], machine.gpu, "GPU memory")]  # fmt: skip
    found += [_evaluating(params, evaluating, machine)]
    return [sentence for sentence in found if sentence]


def _quantizing_ram(params: Params, need: Mapping[str, int], machine: Machine) -> str | None:
    free, whole = machine.ram + machine.interpreter, sum(need.values())
    if whole <= free:
        return None
    start = f"quantizing needs {decimal(whole)} of RAM and {decimal(free)} are free"
    sets, windows = need.get("activations", 0), params.calibration.windows
    left = free - (whole - sets)
    if left > 0 and (fitting := windows * left // sets) >= 1:
        return f"{start}: set calibration.windows from {windows} to {fitting}."
    if need.get("step", 0) > whole - free and params.quantize.batch_size > 1:
        return f"{start}: set quantize.batch_size from {params.quantize.batch_size} to 1."
    return f"{start}: take a machine with more, or a smaller model.source than {params.model.source}."


def _quantizing_gpu(params: Params, need: Mapping[str, int] | None, machine: Machine) -> str | None:
    if need is None or machine.gpu is None or sum(need.values()) <= machine.gpu:
        return None
    start = f"quantizing needs {decimal(sum(need.values()))} of GPU memory and {decimal(machine.gpu)} are free"
    if params.quantize.batch_size > 1:
        return f"{start}: set quantize.batch_size from {params.quantize.batch_size} to 1."
    if params.calibration.length > 512:
        return f"{start}: set calibration.length from {params.calibration.length} to {params.calibration.length // 2}."
    return f"{start}: set quantize.device from {params.quantize.device} to cpu, or take a larger GPU."


def _tuning(params: Params, need: Mapping[str, int] | None, free: int | None, place: str) -> str | None:
    if need is None or free is None or sum(need.values()) <= free:
        return None
    tune = params.finetune
    start = f"finetuning needs {decimal(sum(need.values()))} of {place} and {decimal(free)} are free"
    if not tune.activation_checkpointing:
        return f"{start}: set finetune.activation_checkpointing from false to true."
    if tune.batch_size > 1:
        return (
            f"{start}: set finetune.batch_size from {tune.batch_size} to {tune.batch_size // 2} and "
            f"finetune.accumulation from {tune.accumulation} to {2 * tune.accumulation}."
        )
    return f"{start}: set finetune.length from {tune.length} to {tune.length // 2}."


def _refining(params: Params, need: Mapping[str, int] | None, free: int | None, place: str) -> str | None:
    if need is None or free is None or sum(need.values()) <= free:
        return None
    refine = params.refine
    start = f"refining needs {decimal(sum(need.values()))} of {place} and {decimal(free)} are free"
    if need.get("predictions", 0) > sum(need.values()) - free and refine.generated:
        return f"{start}: set refine.generated from {refine.generated} to {refine.generated // 2}."
    if "block" in need:  # it is the full-precision model that does not fit, a few windows at a time already
        return f"{start}: set refine.epochs to 0, or take a machine with more."
    if refine.batch_size > 1:
        return f"{start}: set refine.batch_size from {refine.batch_size} to {refine.batch_size // 2}."
    if refine.activation_checkpointing is False:
        return f"{start}: set refine.activation_checkpointing from false to true."
    return f"{start}: set calibration.length from {params.calibration.length} to {params.calibration.length // 2}."


def _evaluating(params: Params, need: Mapping[str, Any], machine: Machine) -> str | None:
    """Whether the full-precision model is spread, by the rule of `apiq.checkpoint.spreading`."""
    on_gpu = need["gpu"] is not None
    size, free = (need["gpu"][MODEL], machine.gpu or 0) if on_gpu else (need["ram"][MODEL], machine.ram)
    room = int(SHARE * free)
    if size <= room:
        return None
    place, places = ("GPU memory", "GPU, RAM and disk") if on_gpu else ("RAM", "RAM and disk")
    return (
        f"evaluating needs {decimal(size)} of {place} for the full-precision model, which may take {decimal(room)} of "
        f"the {decimal(free)} that are free: accelerate will spread it over {places}, which is slow; "
        + ("set evaluate.dtype from float32 to bfloat16, or " if on_gpu and params.evaluate.dtype == "float32" else "")
        + f"take {'a larger GPU' if on_gpu else 'a machine with more'}."
    )


def _disks(work: str, need: Mapping[str, int], machine: Machine) -> list[str]:
    """One sentence for each disk that is too small for all that lies on it at once; parts of one disk are added up."""
    found: dict[str, dict[str, int]] = {}
    for part, size in need.items():
        place = PLACES.get(part, part)
        found.setdefault("both" if machine.one_disk else place, {})[part] = size
    sentences = []
    for disk, parts in found.items():
        free = min(machine.disk[PLACES.get(part, part)] for part in parts)
        if sum(parts.values()) > free:
            told = ", ".join(f"{part} {decimal(size)}" for part, size in parts.items())
            sentences.append(
                f"{work} needs {decimal(sum(parts.values()))} of disk at once ({told}) and {decimal(free)} are free "
                f"there: set {FIELDS[disk]} to a folder on a larger disk."
            )
    return sentences
