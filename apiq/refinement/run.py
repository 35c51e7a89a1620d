"""Refinement from folder to folder: read, generate, ask the full-precision model, train, write."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiq.checkpoint import manifest
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.card import card
from apiq.checkpoint.loading import full_precision, load
from apiq.checkpoint.original import require_original
from apiq.checkpoint.rewriting import as_read, rewritten
from apiq.device import pick_device, pick_dtype, precision
from apiq.errors import ApiqError
from apiq.evaluation.perplexity import refuse
from apiq.files import new_folder, read_json, write_json, write_text
from apiq.layers.dense import dense
from apiq.memory import in_parts
from apiq.meter import Meter
from apiq.methods.descent import Objective, Trace, descend
from apiq.methods.flat import names
from apiq.outputs import require_place
from apiq.progress import Progress, Step, silent
from apiq.refine_params import RefineParams
from apiq.refinement.admission import refuse_folder, refuse_model
from apiq.refinement.divergence import divergence
from apiq.refinement.generation import generated
from apiq.refinement.hidden import distance, hidden_states
from apiq.refinement.kept import Kept, Rows
from apiq.refinement.teacher import Predictions, predictions
from apiq.refinement.trained import Trained
from apiq.work import alone, code_version, fingerprint, forget, work_folder

LOSSES = "refine.csv"
HIDDEN = "hidden"


def refine(
    folder: str | Path,
    original: str | Path,
    windows: Tensor,
    params: RefineParams,
    out: str | Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train adapters and scales of the quantized model in `folder` against the predictions of the `original` model.

    Minimised is the mean over all positions of KL(p || q), with p of the full-precision and q of the quantized
    model, plus `params.hidden_weight` times the relative squared distance of their last hidden states, on
    `windows` (n, length) and on windows that the quantized model writes. Codes and zero points stay. A
    run that was stopped is taken up after its last finished pass, or batch of written windows, by the same call.

    Returns:
        `loss_first` and `loss_last`, the divergence on `windows` in nats before and after; `windows` and
        `generated`, how many there were; and what the run cost: `seconds` and `cpu_seconds`, with those of stopped
        processes whose work was taken up, and `peak_memory_mb` of this one.

    Raises:
        ApiqError: `original` is not the model that `folder` was made from, the windows do not fit, a file is
            damaged, the loss is not finite whatever the rate, or this folder cannot be refined so.
    """
    if not params.epochs:
        raise ApiqError(
            f"refine.epochs is 0, as in recipe {params.recipe}, which has no refinement; set it, or take recipe best."
        )
    meter, folder = Meter(), Path(folder)
    facts = manifest.verify(folder)
    refuse_folder(folder, facts, params)
    require_place(out, folder, original)
    device = pick_device(params.device)
    compute = pick_dtype(params.dtype, device)
    source = full_precision(original, torch.float32 if compute == torch.float32 else None)
    require_original(facts, folder, source.folder)
    loaded = load(folder, dtype=params.dtype, device=params.device, trainable=True)
    loaded.model.eval()
    refuse(loaded.model, windows)
    refuse_model(loaded.model, params)
    with alone(work_folder(_identity(params, facts, windows))) as work:
        kept = Kept(work, meter)
        everything = _everything(loaded.model, windows, params, compute, progress, kept)

        def ask() -> dict[str, Tensor | None]:
            kept.forget(HIDDEN)
            keep = partial(kept.keep, HIDDEN, whole=False) if params.hidden_weight else None
            return vars(
                predictions(source.stream, everything, params.top_k, device, compute, kept.folder, progress, keep)
            )

        teacher = Predictions(**{"index": None, **kept.once("predictions", ask)})
        trained = Trained(loaded.model, params.lr_scales > 0, params.adapter_bits)
        lesson = _Lesson(trained, everything, teacher, device, compute, kept.rows(HIDDEN), params.hidden_weight)
        again = device.type == "cuda" if params.activation_checkpointing == "auto" else params.activation_checkpointing
        with dense(trained.model):
            first = kept.once("first", lambda: {"loss": lesson.mean(len(windows), params.batch_size)})["loss"]
            with trained.recomputing(source.stream.blocks.path) if again else nullcontext():
                trace = lesson.learn(params, kept, progress)
        trained.settle()
        adapters = trained.adapter_state()
        trained.put(as_read(folder, adapters, params.adapter_bits))
        last = lesson.mean(len(windows), params.batch_size)
        result = {"loss_first": float(first), "loss_last": float(last), "windows": len(windows),
                  "generated": len(everything) - len(windows)}  # fmt: skip
        with new_folder(Path(out)) as new:
            rewritten(folder, new, trained.scales(), adapters, params.adapter_bits)
            _describe(new, facts, params, trace, result)
        forget(work)
    return {**result, **kept.cost(), "out": str(out)}


def _identity(params: RefineParams, facts: dict[str, Any], windows: Tensor) -> dict[str, Any]:
    return {
        "refine": params.model_dump(),
        "files": facts["files"],
        "windows": fingerprint({"windows": windows.tolist()}),
        "code": code_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _everything(
    model: Any, windows: Tensor, params: RefineParams, compute: torch.dtype, progress: Progress, kept: Kept
) -> Tensor:
    """Calibration windows, then generated ones."""
    if not params.generated:
        return windows
    count = params.generated * len(windows)
    own = generated(model, windows, count, params.prompt, params.seed, compute, progress, kept)
    return torch.cat([windows, own])


class _Lesson:
    """The loss of a packed model on windows with the predictions of its teacher."""

    def __init__(
        self, trained: Trained, windows: Tensor, teacher: Predictions, device: torch.device, compute: torch.dtype,
        hidden: Rows | None = None, hidden_weight: float = 0.0,
    ):  # fmt: skip
        self.trained, self.windows, self.teacher = trained, windows, teacher
        self.device, self.compute = device, compute
        self.hidden, self.hidden_weight = hidden, hidden_weight

    def loss(self, batch: slice) -> Tensor:
        """Mean divergence over the positions of some windows."""
        with precision(self.device, self.compute):
            logits = self.trained.model(input_ids=self.windows[batch].to(self.device), use_cache=False).logits
        index = None if self.teacher.index is None else self.teacher.index[batch].to(self.device)
        return divergence(logits, self.teacher.logs[batch].to(self.device), index)

    def losses(self, batch: slice) -> tuple[Tensor, Tensor]:
        """What is minimised, the divergence with the weighted distance of the hidden states, and the divergence."""
        if self.hidden is None or not self.hidden_weight:
            loss = self.loss(batch)
            return loss, loss
        assert self.teacher.power is not None
        with hidden_states(self.trained.base) as seen:
            loss = self.loss(batch)
        away = distance(seen[0], self.hidden[batch].to(self.device), float(self.teacher.power))
        return loss + self.hidden_weight * away, loss

    def scale(self, size: int) -> float | None:
        """What to multiply the loss of `size` windows by before the backward pass in float16: its positions.

        The gradient of a logit, (q - p) / positions, is below what float16 can hold where q is near p.
        """
        return float(self.windows[:size].numel()) if self.compute == torch.float16 else None

    @torch.no_grad()
    def mean(self, count: int, size: int) -> Tensor:
        """Mean divergence over the first `count` windows, `size` at a time where memory allows."""
        losses: list[Tensor] = []

        def add(batch: slice) -> None:
            losses.append(self.loss(batch) * (batch.stop - batch.start))

        in_parts(count, size, add, "the divergence of the quantized model")
        return (torch.stack(losses).double().sum() / count).cpu()

    def learn(self, params: RefineParams, kept: Kept, progress: Progress) -> Trace:
        """Train what is open of the model."""
        total, shown = params.epochs * len(self.windows), {"done": 0, "loss": None}

        def loss_of(batch: slice) -> tuple[Tensor, Tensor]:
            losses = self.losses(batch)
            shown["done"] += batch.stop - batch.start
            progress(Step("refine", min(shown["done"], total), total, f"window {shown['done']}/{total}", shown["loss"]))
            return losses

        def report(epoch: int, loss: float) -> None:
            shown.update(done=epoch * len(self.windows), loss=loss)

        objective = Objective(
            loss_of, len(self.windows), "refinement", names=names(self.trained.model),
            scale=self.scale(params.batch_size),
            remedy="lower refine.lr_adapter and refine.lr_scales, or set refine.dtype to float32",
        )  # fmt: skip
        return descend(self.trained.groups(params), objective, params, params.seed, report, kept)


def _describe(new: Path, facts: dict[str, Any], params: RefineParams, trace: Trace, result: dict[str, Any]) -> None:
    """Write metrics, losses, manifest and model card of the refined checkpoint in `new`."""
    metrics, bits = read_json(new / "metrics.json"), effective_bits(new).as_dict()
    write_json(new / "metrics.json", {**metrics, "effective_bits": bits["total"], "bits": bits, "refine": result})
    with open(new / LOSSES, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["epoch", "loss"])
        rows.writerows([epoch, repr(loss)] for epoch, loss in enumerate(trace.losses, start=1))
    kept = {key: value for key, value in facts.items() if key not in ("format", "kind", "files")}
    manifest.write(new, "quantized", **{**kept, "refined": params.model_dump(mode="json")})
    write_text(new / "README.md", card(new))
