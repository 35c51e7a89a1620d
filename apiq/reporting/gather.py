"""What the stages left behind, read once: numbers as they are, and a reason for everything that is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from apiq.checkpoint import skipped
from apiq.reporting import records
from apiq.reporting.errors import LinearErrors, read_errors
from apiq.reporting.sweeps import Sweep, read_sweeps
from apiq.reporting.units import known

PHASES = ("model", "calibration", "quantize", "refine", "finetune", "evaluate")
MANIFESTS = {
    "model": ("model", "model.json"),
    "calibration": ("calibration", "manifest.json"),
    "quantize": ("quantized", "apiq.json"),
    "refine": ("refined", "apiq.json"),
    "finetune": ("finetuned", "apiq.json"),
    "evaluate": ("evaluation", "results.json"),
}
"""Phase -> its folder and the file in it that says where its results came from."""


@dataclass(frozen=True)
class Folders:
    """Where the stages wrote; None for what was not done."""

    model: Path | None = None
    calibration: Path | None = None
    quantized: Path | None = None
    finetuned: Path | None = None
    evaluation: Path | None = None
    timing: Path | None = None
    refined: Path | None = None
    sweeps: Path | None = None

    @classmethod
    def below(cls, data: str | Path) -> Folders:
        """The folders as the stages of the pipeline name them in `data`."""
        return cls(**{each.name: Path(data) / each.name for each in fields(cls)})


@dataclass(frozen=True)
class BlockLoss:
    """Mean squared error of a block's output before and after fitting; None where it was not measured."""

    block: int
    first: float | None
    last: float | None


@dataclass(frozen=True)
class Curve:
    """Loss by epoch of one block, or of one linear (`group`) of it; epoch 0 is before fitting."""

    block: int
    group: str
    epochs: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class TrainingLog:
    """Losses of finetuning in nats per token, as (step, loss)."""

    training: tuple[tuple[float, float], ...]
    held_out: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Run:
    """All that the page tells."""

    folders: Folders
    manifests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Phase -> what its manifest says, parameters and hashes among it."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """metrics.json of the quantized model."""
    blocks: Sequence[BlockLoss] = ()
    curves: Sequence[Curve] = ()
    training: TrainingLog | None = None
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Model (full, quantized, finetuned, ...) -> {perplexity: {text: value}, tasks: {task: {metric: value}}}."""
    errors: Sequence[LinearErrors] = ()
    """Of weights and activations, by model, block and linear."""
    sweeps: Sequence[Sweep] = ()
    timing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Phase -> seconds, cpu_seconds, peak_memory_mb, peak_gpu_memory_mb."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Topic -> why there is nothing on it."""


def gather(folders: Folders) -> Run:
    """Read what the stages left.

    Raises:
        ApiqError: a file is there but damaged; what is missing is told in `absent` instead.
    """
    absent: dict[str, str] = {}

    def content(topic: str, folder: Path | None, name: str, stage: str) -> Path | None:
        if folder is None:
            absent[topic] = f"The {stage} was left out of this report."
        elif not (folder / name).is_file():
            absent[topic] = f"There is no {name} of the {stage}: it has not been run."
        else:
            return folder / name
        return None

    metrics = content("quantized", folders.quantized, "metrics.json", "quantization")
    losses = content("curves", folders.quantized, "losses.csv", "quantization")
    log = content("finetuned", folders.finetuned, "log.csv", "finetuning")
    manifests = _manifests(folders)
    if manifests.get("finetune", {}).get("kind") == skipped.KIND:
        absent["finetuned"] = "Nothing was finetuned: finetune.task is none."
    evaluation = content("evaluation", folders.evaluation, "metrics.json", "evaluation")
    errors = content("errors", folders.evaluation, "errors.csv", "evaluation")
    quantization = records.mapping(metrics) if metrics else {}
    if metrics:
        records.mapping_in(metrics, quantization, "bits")
    return Run(
        folders=folders,
        manifests=manifests,
        quantization=quantization,
        blocks=_blocks(records.listed(metrics, quantization, "blocks") if metrics else ()),
        curves=_curves(losses) if losses else (),
        training=_training(log) if log else None,
        evaluation=_evaluation(evaluation) if evaluation else {},
        errors=read_errors(errors) if errors else (),
        sweeps=read_sweeps(folders.sweeps) if folders.sweeps else (),
        timing=_timing(folders.timing),
        absent=absent,
    )


def _manifests(folders: Folders) -> dict[str, dict[str, Any]]:
    given = {phase: (getattr(folders, folder), name) for phase, (folder, name) in MANIFESTS.items()}
    files = {phase: folder / name for phase, (folder, name) in given.items() if folder}
    manifests = {phase: records.mapping(file) for phase, file in files.items() if file.is_file()}
    if measured := manifests.get("evaluate"):  # by model; all were measured in the same way
        first = records.mapping_in(files["evaluate"], measured, next(iter(measured)))
        manifests["evaluate"] = records.mapping_in(files["evaluate"], first, "protocol")
    for phase in manifests:
        records.mapping_in(files[phase], manifests[phase], "parameters")
    return manifests


def _evaluation(path: Path) -> dict[str, dict[str, Any]]:
    """The metrics of each model, whose perplexities and tasks are mappings."""
    evaluation = records.mapping(path)
    for model in evaluation:
        measured = records.mapping_in(path, evaluation, model)
        records.mapping_in(path, measured, "perplexity")
        tasks = records.mapping_in(path, measured, "tasks")
        for task in tasks:
            records.mapping_in(path, tasks, task)
    return evaluation


def _timing(folder: Path | None) -> dict[str, dict[str, float]]:
    """Costs by phase; that of the report itself would make the page depend on its own past."""
    files = {phase: folder / f"{phase}.json" for phase in PHASES} if folder else {}
    return {phase: records.mapping(file) for phase, file in files.items() if file.is_file()}


def _blocks(rows: Sequence[Mapping[str, Any]]) -> tuple[BlockLoss, ...]:
    def loss(row: Mapping[str, Any], key: str) -> float | None:
        return row[key] if known(row.get(key)) else None

    return tuple(BlockLoss(place, loss(row, "loss_first"), loss(row, "loss_last")) for place, row in enumerate(rows))


def _curves(path: Path) -> tuple[Curve, ...]:
    points: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for row in records.rows(path, ("block", "name", "epoch", "loss")):
        block, epoch, loss = (records.value(path, row, column) for column in ("block", "epoch", "loss"))
        if block is not None and epoch is not None and loss is not None:
            points.setdefault((int(block), row["name"]), []).append((epoch, loss))
    return tuple(
        Curve(block, group, tuple(epoch for epoch, _ in of_one), tuple(loss for _, loss in of_one))
        for (block, group), of_one in points.items()
    )


def _training(path: Path) -> TrainingLog:
    columns: dict[str, list[tuple[float, float]]] = {"loss": [], "held_out_loss": []}
    for row in records.rows(path, ("step", *columns)):
        step = records.value(path, row, "step")
        for column, points in columns.items():
            loss = records.value(path, row, column)
            if step is not None and loss is not None:
                points.append((step, loss))
    return TrainingLog(tuple(columns["loss"]), tuple(columns["held_out_loss"]))
