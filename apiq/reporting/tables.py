"""The tables of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apiq.reporting import results
from apiq.reporting.cells import Cell, Row, Table, cell
from apiq.reporting.gather import BlockLoss, Run, TrainingLog
from apiq.reporting.units import MINUS, duration, known, memory, nats, number, percent, signed, uncertain
from apiq.reporting.weights import LinearShape

PARTS = {"codes": "codes", "scales": "scales", "zeros": "zero points", "adapters": "adapters"}
"""What bits are spent on, by its key in the metrics and its name on the page."""
COSTS = {
    "time": ("seconds", duration),
    "CPU time": ("cpu_seconds", duration),
    "memory": ("peak_memory_mb", memory),
    "GPU memory": ("peak_gpu_memory_mb", memory),
}
"""Column -> its key in the records and how it is written."""


def results_table(run: Run) -> Table:
    """Perplexity and tasks of every model, each with its difference from full precision below."""
    evaluation = run.evaluation
    models = results.EXPECTED | results.models(evaluation)
    columns = {model: models[model] for model in [*results.KNOWN_MODELS, *models] if model in models}
    perplexities = tuple(_perplexity_row(run, columns, text) for text in results.texts(evaluation))
    tasks = tuple(_task_row(run, columns, task, metric) for task, metric in results.metrics(evaluation))
    groups = (
        ("Perplexity; below it, nats of log perplexity above full precision", perplexities),
        ("Tasks, ± standard error; below, difference from full precision", tasks),
    )
    return Table(("", *columns.values(), "brought back"), tuple(group for group in groups if group[1]))


def _share(share: float | None) -> Cell:
    return cell(share, "Not known: it takes a loss through quantization and a refined or finetuned model.", percent)


def _perplexity_row(run: Run, columns: Mapping[str, str], text: str) -> Row:
    cells = []
    for model, name in columns.items():
        lost = results.loss(run.evaluation, model, text)
        below = "" if lost is None or model == "full" else nats(lost)
        value = run.evaluation.get(model, {}).get("perplexity", {}).get(text)
        cells.append(cell(value, _why(run, model, name), below=below))
    lost, left = (results.loss(run.evaluation, model, text) for model in ("quantized", results.mended(run.evaluation)))
    share = results.brought_back(lost, left)
    return (Cell(text), *cells, _share(share))


def _task_row(run: Run, columns: Mapping[str, str], task: str, metric: str) -> Row:
    cells = []
    full = results.task_metric(run.evaluation, "full", task, metric)
    for model, name in columns.items():
        value = results.task_metric(run.evaluation, model, task, metric)
        error = results.task_metric(run.evaluation, model, task, results.error_name(metric))
        compared = model != "full" and known(value) and known(full)
        below = signed(value - full, 3) if compared else ""
        if known(value) and known(error):
            text, spread = uncertain(value, error)
            cells.append(Cell(text, spread, below))
        else:
            cells.append(cell(value, _why(run, model, name), below=below))
    share = results.task_brought_back(run.evaluation, task, metric)
    return (Cell(task, below=f"{metric}{results.arrow(metric)}"), *cells, _share(share))


def _why(run: Run, model: str, name: str) -> str:
    if "evaluation" in run.absent:
        return run.absent["evaluation"]
    if model not in run.evaluation:
        return f"The {name} model was not evaluated."
    return f"The {name} model was not measured on this."


def bits_table(bits: Mapping[str, Any]) -> Table:
    """What the bits of a quantized weight are spent on; a key to the figure."""
    total, weights = bits.get("total"), bits.get("weights")

    def row(name: str, value: Any, swatch: str = "") -> Row:
        why = f"The metrics of the quantization do not give the bits of {name}."
        size = value * weights / 8 / 2**20 if known(value) and known(weights) else None
        share = value / total if known(value) and known(total) and total else None
        return (Cell(name, swatch=swatch), cell(value, why), cell(share, why, percent), cell(size, why, memory))

    rows = (*(row(name, bits.get(part), part) for part, name in PARTS.items()), row("total", total))
    return Table(("", "bits per weight", "share", "size"), (("", rows),))


def blocks_table(blocks: Sequence[BlockLoss]) -> Table:
    """Error of the output of each block before and after fitting."""
    why = "This method measured no error of the block."
    rows = tuple(
        (
            Cell(str(block.block)),
            cell(block.first, why),
            cell(block.last, why),
            cell(block.last / block.first if block.first and block.last is not None else None, why, percent),
        )
        for block in blocks
    )
    return Table(("block", "before", "after", "left"), (("", rows),))


def cost_table(timing: Mapping[str, Mapping[str, Any]]) -> Table:
    """Time and memory of each phase."""
    why = "It was not measured."
    columns = dict(COSTS)
    if not any("peak_gpu_memory_mb" in cost for cost in timing.values()):
        del columns["GPU memory"]
    rows = [
        (Cell(phase), *(cell(cost.get(key), why, written) for key, written in columns.values()))
        for phase, cost in timing.items()
    ]
    total = tuple(_sum(timing, key, why) if written is duration else Cell("") for key, written in columns.values())
    return Table(("phase", *columns), (("", (*rows, (Cell("all"), *total))),))


def _sum(timing: Mapping[str, Mapping[str, Any]], key: str, why: str) -> Cell:
    values = [value for cost in timing.values() if known(value := cost.get(key))]
    return cell(sum(values) if len(values) == len(timing) else None, why, duration)


def weights_table(shapes: Sequence[LinearShape], why: str) -> Table:
    """Relative weight error of each linear without and with its adapters; `why` it is not known where it is not."""
    rows = tuple(
        (
            Cell(shape.name),
            cell(shape.error_without, why),
            cell(shape.error_with, why if shape.adapters else "There are no adapters."),
        )
        for shape in shapes
    )
    return Table(("linear", f"‖W {MINUS} Q‖ / ‖W‖", f"‖W {MINUS} Q {MINUS} A Bᵀ‖ / ‖W‖"), (("", rows),))


def training_table(log: TrainingLog) -> Table:
    """Held-out loss where it was measured, and the training loss nearest before it."""
    why = "No training loss was logged up to this step."
    rows = []
    for step, held_out in log.held_out:
        before = [loss for at, loss in log.training if at <= step]
        rows.append((Cell(number(int(step))), cell(before[-1] if before else None, why), cell(held_out, why)))
    return Table(("step", "training loss", "held-out loss"), (("", tuple(rows)),))


def words_table(sections: Mapping[str, Mapping[str, str]], head: tuple[str, str]) -> Table:
    """Names and texts in sections: parameters, hashes, versions."""
    groups = tuple(
        (section, tuple((Cell(key), Cell(value)) for key, value in entries.items()))
        for section, entries in sections.items()
    )
    return Table(head, groups, words=True)
