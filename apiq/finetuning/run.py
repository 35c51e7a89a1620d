"""Finetuning from folder to folder: read, train, keep the best adapter, write it with its log."""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerState

from apiq import parallel
from apiq.adapters.pooled import Pooling
from apiq.allocator import give_back_freed
from apiq.checkpoint import manifest
from apiq.checkpoint.adapter_file import read_adapter, write_adapter_file
from apiq.checkpoint.base import noted
from apiq.checkpoint.loading import Loaded, load
from apiq.device import pick_device
from apiq.errors import ApiqError
from apiq.evaluation.perplexity import context_length, require_causal
from apiq.evaluation.run import rounded
from apiq.files import new_folder, read_json, relative, sha256_folder, write_json, write_text
from apiq.finetuning.examples import Examples
from apiq.finetuning.sources import prepare
from apiq.finetuning.tracking import tracker
from apiq.finetuning.trainer import COMPLETE, AdapterTrainer, newest_checkpoint
from apiq.layers.dense import LIMIT
from apiq.layers.packed import PackedLinear
from apiq.meter import Meter
from apiq.method_params import WITHOUT_ADAPTERS
from apiq.methods import METHODS
from apiq.outputs import require_place
from apiq.params import FinetuneParams
from apiq.progress import Progress, silent
from apiq.randomness import borrowed
from apiq.work import alone, code_version, forget, work_folder

COLUMNS = ["step", "loss", "held_out_loss", "learning_rate"]
CONFIG = "adapter_config.json"
POOLED = "pooled"
"""Folder of the adapters as they start when they are pooled."""
TRACKING = "tracking"
"""Folder beside the output for what `finetune.tracking` writes, one folder a run."""


def finetune(
    folder: str | Path, params: FinetuneParams, out: str | Path, progress: Progress = silent
) -> dict[str, Any]:
    """Train the adapters in `folder` on its frozen model and write those with the lowest held-out loss to `out`.

    The adapters that training starts from (pooled ones with `finetune.pooled`) are a candidate too.
    Work in progress is kept in `apiq.work.work_folder`; the same call after a kill goes on from the
    last checkpoint and ends with the same bytes. What `finetune.tracking` writes goes to `tracking/` beside
    `out`, so that `out` is the same with and without. Several processes (`apiq.parallel`) divide the batches of
    a step.

    Args:
        folder: a quantized or finetuned model with adapters.
        params: data and hyperparameters.
        out: gets `adapter/` (PEFT format), `apiq.json` (kind `finetuned`, relative path of the
            base), `log.csv` (one row a step) and `metrics.json`.
        progress: told after every step.

    Returns:
        The content of metrics.json, and what the run cost: `seconds`, `cpu_seconds`, `peak_memory_mb`. With
        `finetune.pooled` there is `pooled_change`, how far pooling moved all A from what they were: ||A' - A|| / ||A||.

    Raises:
        ApiqError: the folder has no adapters or is damaged, the data cannot be used, the adapters cannot be pooled,
            a step cannot be divided among the processes, another process does this very work, or a loss is not
            finite (finished checkpoints are kept).
    """
    meter, folder, out = Meter(), Path(folder), Path(out)
    device = parallel.join(pick_device(params.device))
    with borrowed(params.seed):
        loaded = load(folder, dtype=params.dtype, device=str(device), trainable=True)
        folder = folder if folder.is_dir() else loaded.folder  # the name of a repository on the hub
        require_place(out, folder, loaded.folder)
        if not isinstance(loaded.model, PeftModel):
            raise ApiqError(_without_adapters(folder, loaded.kind))
        require_causal(loaded.model)
        if _is_large(loaded):
            give_back_freed()
        loaded.model.peft_config["default"].base_model_name_or_path = str(loaded.folder)  # or PEFT asks the hub for it
        examples = prepare(params, loaded.tokenizer, context_length(loaded.model))
        _require_known(examples, loaded.model)
        with _at_work(folder, loaded, params, examples) as work:
            first = parallel.rank() == 0
            pooling = Pooling(loaded.model, "finetune.pooled") if params.pooled else None
            if pooling is not None and first:
                loaded.model.save_pretrained(str(work / POOLED))
            tracks = out.parent / TRACKING / f"{out.name}-{work.name[:8]}"
            told = tracker(params, tracks) if first else ()
            trainer = AdapterTrainer(loaded.model, examples, params, work, progress, told, pooling)
            start = _start(trainer, work)
            newest = newest_checkpoint(work)
            trainer.finish(newest)
            if first:
                began = folder / "adapter" if pooling is None else work / POOLED
                _write(out, began, loaded, examples, start, trainer.state, pooling)
                forget(work)
            parallel.wait()
    return read_json(out / "metrics.json") | meter.reading()


def _without_adapters(folder: Path, kind: str) -> str:
    if kind == "full":
        return f"{folder} is a full-precision model; run apiq quantize first, and give the folder that it writes."
    with_some = ", ".join(method for method in METHODS if method not in WITHOUT_ADAPTERS)
    return f"{folder} has no adapters to train; quantize with a method that gives it some: {with_some}."


def _require_known(examples: Examples, model: Any) -> None:
    """Refuse tokens that the model has no embedding for."""
    rows = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    highest = max(max(example["input_ids"]) for example in [*examples.train, *examples.held_out])
    if highest >= rows:
        raise ApiqError(
            f"the examples hold token {highest}, the model knows {rows}: its folder has the tokenizer of another model."
        )


def _is_large(loaded: Loaded) -> bool:
    """Whether freed memory matters more than the time that giving it back takes."""
    packed = [module for module in loaded.model.modules() if isinstance(module, PackedLinear)]
    return sum(linear.in_features * linear.out_features for linear in packed) > LIMIT


@contextlib.contextmanager
def _at_work(folder: Path, loaded: Loaded, params: FinetuneParams, examples: Examples) -> Iterator[Path]:
    """Where the checkpoints of this very run are, held by its first process; half-written ones are removed.

    Raises:
        ApiqError: another process does this very work.
    """
    work = work_folder(
        {"finetune": params.model_dump(exclude={"tracking"}), "code": code_version(), "processes": parallel.size(),
         "start": _content(folder), "base": _content(loaded.folder), "data": examples.source}
    ).resolve()  # fmt: skip
    with alone(work) if parallel.rank() == 0 else contextlib.nullcontext():
        if parallel.rank() == 0:
            for checkpoint in work.glob("checkpoint-*"):
                if not (checkpoint / COMPLETE).exists():
                    shutil.rmtree(checkpoint)
        parallel.wait()
        yield work


def _content(folder: Path) -> dict[str, str]:
    known = manifest.read(folder)
    return known["files"] if known else sha256_folder(folder)


def _start(trainer: AdapterTrainer, work: Path) -> float:
    """The held-out loss before the first step, measured once for all resumptions."""
    path = work / "start.json"
    known = path.exists()
    parallel.wait()
    if known:
        return read_json(path)
    trainer.evaluate()
    start = trainer.state.log_history.pop()["eval_loss"]
    if parallel.rank() == 0:
        write_json(path, start)
    return start


def _write(
    out: Path,
    began: Path,
    loaded: Loaded,
    examples: Examples,
    start: float,
    state: TrainerState,
    pooling: Pooling | None,
) -> None:
    """Write the best adapter, which may be the one in `began`, its manifest, log.csv and metrics.json."""
    best, lowest = 0, start
    if state.best_metric is not None and state.best_metric < start:
        best, lowest = int(state.best_global_step or 0), state.best_metric
    trained = Path(state.best_model_checkpoint or "")
    metrics = examples.counts | {
        "held_out_loss_first": rounded(start),
        "held_out_loss_best": rounded(lowest),
        "best_step": best,
        "steps": state.global_step,
        "tokens": int(state.num_input_tokens_seen),
        **({} if pooling is None else {"pooled_change": rounded(pooling.change)}),
    }
    with new_folder(out) as new:
        _write_adapter(new / "adapter", trained if best else began, relative(loaded.folder, out / "adapter"))
        write_text(new / "log.csv", _log(start, state.log_history))
        write_json(new / "metrics.json", metrics)
        manifest.write(new, "finetuned", **noted(loaded.folder, out), data=examples.source)


def _write_adapter(folder: Path, source: Path, base: str) -> None:
    folder.mkdir()
    write_adapter_file(folder, read_adapter(source))
    config = read_json(source / CONFIG)
    write_json(folder / CONFIG, config | {"base_model_name_or_path": base, "inference_mode": True})


def _log(start: float, history: list[dict[str, Any]]) -> str:
    """CSV with a row for each step, and one for step 0, where only the held-out loss is known."""
    rows: dict[int, dict[str, float]] = {0: {"step": 0, "held_out_loss": rounded(start)}}
    for entry in history:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        for key, column in {"loss": "loss", "eval_loss": "held_out_loss", "learning_rate": "learning_rate"}.items():
            if key in entry:
                row[column] = rounded(entry[key])
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue()
