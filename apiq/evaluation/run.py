"""One model measured on everything that `evaluate` lists, and several models side by side."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from apiq.calibration.corpora import load_corpus
from apiq.calibration.windows import consecutive_windows, tokenize
from apiq.errors import ApiqError
from apiq.evaluation.perplexity import perplexity, refuse, require_causal
from apiq.files import read_json, write_json
from apiq.params import EvaluateParams
from apiq.progress import Progress, naming, silent
from apiq.work import fingerprint

DIGITS = 6
"""Significant digits of what is written down: beyond them the order of additions shows."""


class Model(Protocol):
    """A model with its tokenizer, as `apiq.checkpoint.loading.load` gives it."""

    model: Any
    tokenizer: Any


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    params: EvaluateParams,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexities and task metrics of one model.

    Returns:
        `perplexity`: by name of the corpus; `tasks`: by task and metric; `protocol`: what was
        measured on, for each corpus source, SHA-256, windows and length, for each task documents,
        shots and version.

    Raises:
        ApiqError: a corpus or task cannot be had, or does not fit the model.
    """
    return _Bench(params).measure(model, tokenizer, progress)


def compare(
    models: Mapping[str, Callable[[], Model]],
    params: EvaluateParams,
    progress: Progress = silent,
    kept: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """What `evaluate` gives for each model, rounded to 6 digits; one model is in memory at a time.

    Args:
        models: a function that loads the model, by the name that it carries in the results.
        params: what to measure on; read and tokenized once.
        progress: told which model is measured.
        kept: a folder for the results of each model, which are taken from there where they are.
    """
    bench, results = _Bench(params), {}
    for name, load in models.items():
        place = None if kept is None else kept / f"{name}-{bench.content()}.json"
        if place is not None and place.is_file():
            results[name] = read_json(place)
            continue
        loaded = load()
        results[name] = rounded(bench.measure(loaded.model, loaded.tokenizer, naming(name, progress)))
        if place is not None:
            write_json(place, results[name])
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of `results` alone, as DVC compares them: model, then perplexity, tasks or errors, then name."""
    kinds = ("perplexity", "tasks", "errors", "effective_bits")
    return {name: {kind: result[kind] for kind in kinds if result.get(kind)} for name, result in results.items()}


def rounded(value: Any) -> Any:
    """`value` with every float in it cut to 6 significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


class _Bench:
    """Corpora and tasks, read once, and the windows of each tokenizer that came along."""

    def __init__(self, params: EvaluateParams) -> None:
        self._params = params
        self._suite = _load_suite(params) if params.tasks else None
        self._corpora = {
            name: load_corpus(text.text, split="test", column=text.column, join=text.join)
            for name, text in params.perplexity.items()
        }
        self._windows: dict[tuple[str, str], torch.Tensor] = {}

    def content(self) -> str:
        """A short hash of the texts, and of the tasks with their documents."""
        texts = {name: corpus.sha256 for name, corpus in self._corpora.items()}
        return fingerprint({"texts": texts, "tasks": None if self._suite is None else self._suite.content()})

    def measure(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> dict[str, Any]:
        require_causal(model)
        windows = {name: self._cut(name, tokenizer) for name in self._params.perplexity}
        for each in windows.values():
            refuse(model, each)  # all of them before hours are spent on the first
        self._require_tasks(model, tokenizer)
        values = {
            name: perplexity(model, each, self._params.batch_size, naming(name, progress))
            for name, each in windows.items()
        }
        tasks = self._run_tasks(model, tokenizer, progress)
        return {
            "perplexity": values,
            "tasks": {name: record["metrics"] for name, record in tasks.items()},
            "protocol": {
                "perplexity": {name: self._protocol(name, each) for name, each in windows.items()},
                "tasks": {name: {k: v for k, v in record.items() if k != "metrics"} for name, record in tasks.items()},
            },
        }

    def _cut(self, name: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        key = (name, _identity(tokenizer))
        if key not in self._windows:
            text = self._params.perplexity[name]
            tokens = tokenize(self._corpora[name].text, tokenizer)
            self._windows[key] = consecutive_windows(tokens, text.windows, text.length)
        return self._windows[key]

    def _protocol(self, name: str, windows: torch.Tensor) -> dict[str, Any]:
        corpus, text = self._corpora[name], self._params.perplexity[name]
        facts = {"origin": corpus.origin, "sha256": corpus.sha256, "join": text.join}
        return {"text": text.text, "windows": len(windows), "length": text.length, **facts}

    def _require_tasks(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        if self._suite is not None:
            from apiq.evaluation.tasks import require_runnable

            require_runnable(self._suite, model, tokenizer)

    def _run_tasks(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        if self._suite is None:
            return {}
        from apiq.evaluation.tasks import run_suite

        limit, size = self._params.limit, self._params.batch_size
        return run_suite(model, tokenizer, self._suite, limit=limit, batch_size=size, progress=progress)


def _load_suite(params: EvaluateParams) -> Any:
    try:
        from apiq.evaluation.tasks import load_suite
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ApiqError("evaluate.tasks needs lm-eval, which is not installed; run pip install 'apiq[eval]'.") from None
    return load_suite(params.tasks, params.task_folder)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides the tokens of a text: fast tokenizers tell it all, of a slow one only this object is like it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return hashlib.sha256(backend.to_str().encode()).hexdigest() if backend is not None else str(id(tokenizer))
