"""The transformers Trainer, resumable and silent, with a held-out loss that is a plain mean over tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.utils.import_utils import is_bitsandbytes_available

from apiq import parallel
from apiq.adapters.pooled import Pooling
from apiq.device import pick_device, pick_dtype
from apiq.errors import ApiqError
from apiq.evaluation.perplexity import text_config
from apiq.finetuning.examples import IGNORED, Examples, collate
from apiq.finetuning.packing import collate_packed, refuse_what_mixes
from apiq.params import FinetuneParams
from apiq.progress import Progress, Step

COMPLETE = "complete"
"""Empty file that marks a checkpoint whose every byte is written."""
NEVER = 10**9
OPTIMIZERS = {"adamw": "adamw_torch", "adamw-8bit": "adamw_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
"""The Trainer's names."""


class AdapterTrainer(Trainer):
    """Trains what is trainable in a PEFT model by `params`, with checkpoints below `work`."""

    def __init__(
        self,
        model: PeftModel,
        examples: Examples,
        params: FinetuneParams,
        work: Path,
        progress: Progress,
        trackers: Sequence[TrainerCallback] = (),
        pooling: Pooling | None = None,
    ):
        super().__init__(
            model=model,
            args=_arguments(params, work),
            data_collator=collate_packed if params.packing else collate,
            train_dataset=examples.train,  # pyright: ignore[reportArgumentType]
            eval_dataset=examples.held_out,  # pyright: ignore[reportArgumentType]
            callbacks=[*([] if pooling is None else [_Settle(pooling)]), _Watch(params, progress), *trackers],
        )
        self.remove_callback(PrinterCallback)
        text_config(model.get_base_model()).use_cache = False  # the Trainer sees to the outer one only
        if params.packing:
            refuse_what_mixes(model.get_base_model(), self.args.device)

    def finish(self, newest: Path | None) -> None:
        """Train to the last step from the checkpoint `newest`, or from the start; not again where that was the last.

        The Trainer would take one step more there if the epochs are not whole.
        """
        state = None if newest is None else TrainerState.load_from_json(str(newest / TRAINER_STATE_NAME))
        if state is not None and state.global_step >= state.max_steps:
            self.state = state
            return
        self.train(resume_from_checkpoint=str(newest) if newest else None)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log the held-out loss; unlike the Trainer's own, it does not depend on how examples fall into batches."""
        metrics = {"eval_loss": self.held_out_loss()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean cross-entropy, in nats, of all held-out tokens that have a label and a predecessor.

        It is that of the model below the tuner: AdaLoRA adds its regularization to the loss above. Of several
        processes each takes every so many batches.
        """
        assert isinstance(self.model, PeftModel)
        self.model.eval()
        losses, tokens = [], 0
        for batch in self._held_out_batches():
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            with self.accelerator.autocast():
                losses.append(float(self.model.get_base_model()(**batch).loss) * count)
            tokens += count
        loss, tokens = parallel.sums([math.fsum(losses), tokens], self.args.device)
        return loss / tokens

    def _held_out_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        size, own = self.args.per_device_eval_batch_size, torch.Generator()  # or the loader draws from the global one
        data, merge = self.eval_dataset, self.data_collator
        batches = DataLoader(data, batch_size=size, collate_fn=merge, generator=own)  # pyright: ignore[reportArgumentType]
        for batch in itertools.islice(batches, parallel.rank(), None, parallel.size()):
            yield self._prepare_inputs(batch)


def newest_checkpoint(work: Path) -> Path | None:
    """The last checkpoint below `work` that was written to the end."""
    finished = [path.parent for path in work.glob(f"checkpoint-*/{COMPLETE}")]
    return max(finished, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _Watch(TrainerCallback):
    """Says when to measure and save, marks finished checkpoints, reports, and stops at a loss that is not finite."""

    def __init__(self, params: FinetuneParams, progress: Progress) -> None:
        self._params, self._progress = params, progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        times = self._params.checkpoints
        marks = {math.ceil(i * state.max_steps / times) for i in range(1, times + 1)}
        control.should_evaluate = control.should_save = state.global_step in marks

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        logs: dict[str, float] = told["logs"]
        for key, name in {"loss": "loss", "eval_loss": "held-out loss"}.items():
            if key in logs and not math.isfinite(logs[key]):
                raise ApiqError(_not_finite(name, state.global_step, self._params))
        if "loss" in logs:
            self._progress(Step("finetune", state.global_step, state.max_steps, loss=logs["loss"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        parallel.wait()  # every process writes the state of its random numbers
        if parallel.rank() == 0:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _Settle(TrainerCallback):
    """Keeps pooled adapters pooled to the last bit."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._pooling.settle()


def _not_finite(name: str, step: int, params: FinetuneParams) -> str:
    if step == 0:
        return f"the {name} is not finite before the first step; the model is damaged, or try finetune.dtype float32."
    return (
        f"the {name} is not finite at step {step} of finetuning; lower finetune.learning_rate "
        f"(it is {params.learning_rate:g}), lengthen finetune.warmup or set finetune.dtype to float32."
    )


def _arguments(params: FinetuneParams, work: Path) -> TrainingArguments:
    device = pick_device(params.device)
    dtype = pick_dtype(params.dtype, device)
    if device.type == "cpu" and dtype == torch.float16:
        raise ApiqError("finetune.dtype is float16, which cannot be trained on a CPU; use float32 or bfloat16.")
    if device.index:
        raise ApiqError(
            f"finetune.device is {device}; the Trainer takes the first GPU that it sees, "
            f"so set it to cuda and the environment variable CUDA_VISIBLE_DEVICES to {device.index}."
        )
    if params.accumulation % parallel.size():
        raise ApiqError(
            f"finetune.accumulation is {params.accumulation}; it must be a multiple of {parallel.size()}, the number "
            "of processes, which divide the batches of a step."
        )
    if params.optimizer != "adamw" and not is_bitsandbytes_available():
        raise ApiqError(
            f"finetune.optimizer is {params.optimizer}, which needs bitsandbytes; pip install bitsandbytes, "
            "or set it to adamw."
        )
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=params.epochs,
        per_device_train_batch_size=params.batch_size,
        per_device_eval_batch_size=params.batch_size,
        gradient_accumulation_steps=params.accumulation // parallel.size(),
        ddp_broadcast_buffers=False,  # the packed weights, which no process changes
        optim=OPTIMIZERS[params.optimizer],
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.schedule if params.schedule != "constant" else "constant_with_warmup",
        warmup_steps=params.warmup,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        activation_checkpointing=params.activation_checkpointing,
        use_cpu=device.type == "cpu",
        seed=params.seed % 2**32,
        data_seed=params.seed,
        eval_strategy="no",  # _Watch says when
        save_strategy="steps",
        save_steps=NEVER,
        save_total_limit=2,  # and the best: an older one is only deleted when a newer one is marked complete
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if params.packing else "non_padding",  # that needs an attention mask
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several would be split by nn.DataParallel, which is slower than one
    return arguments
