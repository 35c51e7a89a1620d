"""lm-eval in this process: any of its tasks, or tasks of your own in YAML, on a model in memory."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import torch
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from lm_eval.api.metrics import mean
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from apiq.errors import ApiqError
from apiq.evaluation.perplexity import context_length
from apiq.progress import Progress, Step, silent
from apiq.randomness import borrowed

FEWSHOT_SEED = 1234  # lm-eval's own default: the examples are those of published results
GENERATED = 256  # tokens that lm-eval lets a model write where the task does not say
REQUESTS_AT_ONCE = 32  # batches between two progress reports

Answer = TypeVar("Answer")
HFLM: Any = lm_eval.models.huggingface.HFLM  # lm-eval's decorators hide the types of both
evaluate: Any = lm_eval.evaluator.evaluate


@dataclass(frozen=True)
class Suite:
    """Tasks that are loaded once and run on one model after another."""

    loaded: Mapping[str, Any]
    """What lm-eval's TaskManager gives for each of the names asked for."""

    def content(self) -> dict[str, Any]:
        """What decides the results of a model: the tasks, a hash of the documents of each, the version of lm-eval."""
        tasks = {name: task for found in self.loaded.values() for name, task in found["tasks"].items()}
        found = {
            name: [str(task.dump_config()), hashlib.sha256(str(list(task.eval_docs)).encode()).hexdigest()]
            for name, task in tasks.items()
        }
        return {"lm_eval": lm_eval.__version__, **found}


def load_suite(names: Sequence[str], folder: str | Path | None = None) -> Suite:
    """Find and load tasks, their data included.

    Args:
        names: tasks, groups or tags of lm-eval, or of the YAML files below `folder`.
        folder: descriptions of your own; where one has the name of a built-in task, it is taken.
            lm-eval's own index (thousands of files) is read only if a name is not found here.

    Raises:
        ApiqError: the folder is not there, a name is unknown, or a task or its data cannot be loaded.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ApiqError(f"there is no folder {folder} with task descriptions; evaluate.task_folder must name one.")
    with _quiet(), borrowed(FEWSHOT_SEED):
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(folder) if folder else None)
        return Suite({name: _load(manager, name, folder) for name in names})


def run_suite(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    limit: int = 0,
    batch_size: int = 1,
    progress: Progress = silent,
) -> dict[str, dict[str, Any]]:
    """Metrics and record of each task.

    Args:
        model: a causal language model, on its device.
        tokenizer: the tokenizer of the model.
        suite: from `load_suite`.
        limit: first so many documents of each task; 0 for all.
        batch_size: sequences in one forward pass.
        progress: told how many requests of the task in hand are answered.

    Returns:
        By task (and group): `metrics`, numbers by lm-eval's name of the metric, with the name of
        the filter behind a dot if it has one (`acc`, `acc_norm`, `exact_match.strict`), and
        `documents`, `fewshot` and `version` of the task.

    Raises:
        ApiqError: as `require_runnable`, or lm-eval fails at a task.
    """
    require_runnable(suite, model, tokenizer)
    results: dict[str, dict[str, Any]] = {}
    with _quiet():
        lm = _ReportingLM(model, copy.deepcopy(tokenizer), batch_size, progress)  # lm-eval gives it a pad token
    for name, tasks in suite.loaded.items():
        lm.task = name
        with _quiet(logging.WARNING), borrowed(FEWSHOT_SEED):
            for task in tasks["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            try:
                found = evaluate(
                    lm=lm,
                    task_dict=tasks,
                    limit=limit or None,
                    bootstrap_iters=_bootstraps(tasks),
                    log_samples=False,
                )
            except (ApiqError, MemoryError, OSError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # a task and its metrics can fail in any way
                raise ApiqError(
                    f"lm-eval cannot run the task {name} ({type(error).__name__}: {_first_line(error)}); take it out "
                    "of evaluate.tasks, or mend its description."
                ) from error
        results |= _records(found or {})
    return results


def require_runnable(suite: Suite, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what lm-eval would fail at for want of a special token or of context, before anything is computed.

    Raises:
        ApiqError: the tokenizer has no token to begin a text with, or none to end an answer with, or a task asks for
            answers as long as the context.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ApiqError("the tokenizer has neither a bos nor an eos token, one of which lm-eval puts before a text.")
    context = context_length(model)
    for name, tasks in suite.loaded.items():
        for task in tasks["tasks"].values():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            if tokenizer.eos_token_id is None:
                raise ApiqError(f"the task {name} lets the model write, and the tokenizer has no eos token to end it.")
            asked = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, GENERATED)
            longest = asked.get("max_gen_toks", GENERATED)
            if context is not None and longest >= context:
                raise ApiqError(
                    f"max_gen_toks of the task {name} is {longest}; it must be less than {context}, the context of "
                    "the model: set it in generation_kwargs of a description of your own (evaluate.task_folder)."
                )


class _ReportingLM(HFLM):
    """lm-eval's Hugging Face model, which answers in portions and reports after each."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, batch_size: int, progress: Progress) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=context_length(model),
        )
        self.task, self._progress = "", progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._portions(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._portions(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self._portions(super().generate_until, requests)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _portions(self, answer: Callable[..., list[Answer]], requests: list[Any]) -> list[Answer]:
        answers: list[Answer] = []
        size = REQUESTS_AT_ONCE * int(self.batch_size)
        for start in range(0, len(requests), size):
            answers += answer(requests[start : start + size], disable_tqdm=True)
            self._progress(Step("tasks", len(answers), len(requests), self.task))
        return answers


def _load(manager: TaskManager, name: str, folder: str | Path | None) -> Any:
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists the built-in ones."
        where = f"neither lm-eval nor {folder} has" if folder else "lm-eval does not have"
        raise ApiqError(f"evaluate.tasks names {name}, which {where}; {hint}")
    try:
        tasks = manager.load([name])
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    except Exception as error:  # a task description can fail in any way: network, data, YAML, its own code
        raise ApiqError(
            f"the lm-eval task {name} cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "its data must be on this machine or the hub within reach."
        ) from error
    return tasks


def _records(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "metrics": _flat(metrics),
            "documents": found["n-samples"].get(name, {}).get("effective"),
            "fewshot": found["n-shot"].get(name),
            "version": found["versions"].get(name),
        }
        for name, metrics in found["results"].items()
    }


def _flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` as `acc`, `exact_match,strict` as `exact_match.strict`; what is no number is left out."""
    return {
        key.removesuffix(",none").replace(",", "."): float(value)
        for key, value in sorted(metrics.items())
        if "," in key and isinstance(value, int | float)
    }


def _bootstraps(tasks: Mapping[str, Any]) -> int:
    """1 switches lm-eval's standard errors on, and is safe only where they have a closed form: those of means."""
    return int(all(how is mean for task in tasks["tasks"].values() for how in task.aggregation().values()))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")


@contextlib.contextmanager
def _quiet(level: int = logging.ERROR) -> Iterator[None]:
    """No bars of lm-eval and datasets, no messages below `level`; what they print goes to stderr, never to stdout."""
    logger, tqdm, bars = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm, is_progress_bar_enabled()
    before = logger.level
    logger.setLevel(level)
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
        lm_eval.api.task.tqdm = tqdm
        if bars:
            enable_progress_bar()
