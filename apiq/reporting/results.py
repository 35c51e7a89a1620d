"""What was lost and what was brought back, from the metrics of the evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from apiq.reporting.gather import Run
from apiq.reporting.units import known, nats, number, percent

Evaluation = Mapping[str, Mapping[str, Any]]

KNOWN_MODELS = {
    "full": "full precision",
    "rtn": "round to nearest",
    "quantized": "quantized",
    "refined": "refined",
    "finetuned": "finetuned",
}
EXPECTED = {model: KNOWN_MODELS[model] for model in ("full", "quantized", "finetuned")}
UP, DOWN = "\N{NO-BREAK SPACE}↑", "\N{NO-BREAK SPACE}↓"
HIGHER = ("acc", "exact_match", "f1", "mcc", "bleu", "rouge", "pass", "em")
LOWER = ("perplexity", "bits_per_byte", "ter", "brier")


def models(evaluation: Evaluation) -> dict[str, str]:
    """The models that were measured, with the name that each has on the page: known ones first, in their order."""
    known_ones = {model: name for model, name in KNOWN_MODELS.items() if model in evaluation}
    return known_ones | {model: model for model in evaluation if model not in known_ones}


def perplexity(evaluation: Evaluation, model: str, text: str) -> float | None:
    """Perplexity of a model on a text; None if it is missing or not a finite number above zero."""
    value = evaluation.get(model, {}).get("perplexity", {}).get(text)
    return value if known(value) and value > 0 else None


def texts(evaluation: Evaluation) -> list[str]:
    """Every text on which some model was measured."""
    return list(dict.fromkeys(text for model in evaluation for text in evaluation[model].get("perplexity", {})))


def loss(evaluation: Evaluation, model: str, text: str) -> float | None:
    """Log perplexity above that of the full-precision model, in nats."""
    value, full = perplexity(evaluation, model, text), perplexity(evaluation, "full", text)
    return None if value is None or full is None else math.log(value / full)


def losses(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Text -> model other than full precision -> what it lost; without what is not known."""
    found = {
        text: {
            model: value
            for model in models(evaluation)
            if model != "full" and (value := loss(evaluation, model, text)) is not None
        }
        for text in texts(evaluation)
    }
    return {text: of_models for text, of_models in found.items() if of_models}


def brought_back(lost: float | None, left: float | None) -> float | None:
    """Share of a loss of `lost` nats that is gone when `left` nats are; None if nothing was lost."""
    return None if lost is None or left is None or lost <= 0 else (lost - left) / lost


def mended(evaluation: Evaluation) -> str:
    """The model after all that brings back: the finetuned or, where none was measured, the refined one."""
    return "refined" if "refined" in evaluation and "finetuned" not in evaluation else "finetuned"


def metrics(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Every (task, metric) that some model has, without standard errors, which `error_name` finds."""
    pairs = [
        (task, metric)
        for of_model in evaluation.values()
        for task, values in of_model.get("tasks", {}).items()
        for metric in values
        if "_stderr" not in metric
    ]
    return list(dict.fromkeys(pairs))


def task_metric(evaluation: Evaluation, model: str, task: str, metric: str) -> Any:
    """What a model has for a metric of a task, as it was written."""
    return evaluation.get(model, {}).get("tasks", {}).get(task, {}).get(metric)


def error_name(metric: str) -> str:
    """The name of the standard error of a metric: `acc_stderr`, `exact_match_stderr.strict`."""
    name, dot, of_filter = metric.partition(".")
    return f"{name}_stderr{dot}{of_filter}"


def task_brought_back(evaluation: Evaluation, task: str, metric: str) -> float | None:
    """`brought_back` where it is known whether more is better; perplexities count by their logarithm."""
    values = [task_metric(evaluation, model, task, metric) for model in ("full", "quantized", mended(evaluation))]
    if not all(map(known, values)) or not arrow(metric):
        return None
    if "perplexity" in metric:
        values = [math.log(value) for value in values]
    full, quantized, after = values
    sign = 1 if arrow(metric) == UP else -1
    return brought_back(sign * (full - quantized), sign * (full - after))


def arrow(metric: str) -> str:
    """An arrow in the direction that is better for a metric of lm-eval, as far as its name tells."""
    if any(part in metric for part in LOWER):
        return DOWN
    return UP if metric.startswith(HIGHER) else ""


def headline(run: Run, name: str) -> str:
    """The model, its bits, what was lost in log perplexity, and what refinement and finetuning bring back of it."""
    method = run.quantization.get("method")
    if not method:
        return f"{name} has not been quantized."
    lost, nearest = (mean_loss(run.evaluation, model) for model in ("quantized", "rtn"))
    parameters = run.manifests.get("quantize", {}).get("parameters", {})
    divided = parameters.get("target_bits")
    bits = parameters.get("bits") if divided is None else f"{divided} divided"
    total = run.quantization.get("bits", {}).get("total")
    subject = f"{name} in {bits} bits by {method}" if bits else f"{name} by {method}"
    carried = f" ({number(total, 3)} effective bits)" if known(total) else ""
    if lost is None:
        return f"{subject}{carried}. What it lost in perplexity has not been measured."
    share = ""
    if nearest is not None and nearest > 0 and method != "rtn":
        share = f", {percent(lost / nearest)} of what rounding to nearest loses"
    verb = "loses" if lost >= 0 else "gains"
    found = f"{subject}{carried} {verb} {number(abs(lost), 3)} nats of log perplexity {_where(run.evaluation)}{share}."
    before = lost
    for step, model in (("Refinement", "refined"), ("Finetuning", "finetuned")):
        after = mean_loss(run.evaluation, model)
        if after is not None:
            found, before = f"{found} {_rescue(step, lost, before, after)}", after
    return found


def _rescue(step: str, lost: float, before: float, after: float) -> str:
    if lost <= 0 or after > before:
        return f"{step} changes log perplexity by {nats(after - before)} nats."
    return f"{step} brings back {percent((before - after) / lost)} of that, {number(before - after, 3)} nats."


def mean_loss(evaluation: Evaluation, model: str) -> float | None:
    """Mean over all texts of what a model lost, in nats; None if one of them is not known."""
    values = [loss(evaluation, model, text) for text in texts(evaluation)]
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured and len(measured) == len(values) else None


def _where(evaluation: Evaluation) -> str:
    names = texts(evaluation)
    return f"on {names[0]}" if len(names) == 1 else f"on average over {', '.join(names[:-1])} and {names[-1]}"
