"""A small Llama trained from scratch in minutes on two cores: something real to quantize where there is no network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.calibration.corpora import load_corpus
from apiq.calibration.windows import consecutive_windows, sample_windows, tokenize
from apiq.evaluation.perplexity import perplexity
from apiq.files import new_folder
from apiq.models import manifest
from apiq.params import DemoModel
from apiq.progress import Progress, Step, silent
from apiq.randomness import borrowed

THREADS = 2
"""Threads of the training, whatever the machine has: another number rounds, and so trains, differently."""
BOS, EOS, PAD = SPECIAL = ("<s>", "</s>", "<pad>")


def train_demo(params: DemoModel, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Train the demo model on the train split of the demo corpus and write it as a new folder `out`.

    The folder holds config.json, model.safetensors, the tokenizer and model.json. The same parameters give the same
    bytes on the same machine; the random state of the process is not touched.

    Returns:
        The manifest in model.json, with the loss on the validation split (nats a token) under `training`.

    Raises:
        ApiqError: the corpus is not there, or is shorter than one window.
    """
    train, held_out = load_corpus("demo", split="train"), load_corpus("demo", split="validation")
    tokenizer = train_tokenizer([train.text], params.vocab_size, params.context)
    tokens = tokenize(train.text, tokenizer)
    windows = consecutive_windows(tokenize(held_out.text, tokenizer), 0, params.context)
    with _threads(THREADS), borrowed(params.seed):
        model = LlamaForCausalLM(demo_config(params))
        fit(model, tokens, params, progress)
        loss = math.log(perplexity(model, windows, params.batch_size))
    training = {
        "parameters": model.num_parameters(),
        "corpus": {"origin": train.origin, "sha256": train.sha256, "tokens": len(tokens)},
        "held_out": {"origin": held_out.origin, "sha256": held_out.sha256, "windows": len(windows)},
        "held_out_loss": loss,
    }
    facts = {
        "source": "demo",
        "revision": None,
        "kind": "demo",
        "parameters": params.model_dump(),
        "training": training,
    }
    with new_folder(out) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        return manifest.write(new, new, facts)


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (as in GPT-2) that puts `<s>` in front (as Llama's)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=context
    )


def fit(model: LlamaForCausalLM, tokens: torch.Tensor, params: DemoModel, progress: Progress) -> None:
    """AdamW on random windows: linear warm-up in the first tenth of the steps, then a cosine to zero.

    Every second window begins with `<s>` in place of its first token, so that the model knows prompts as well as
    windows out of the middle of a text.
    """
    generator = torch.Generator().manual_seed(params.seed)
    windows = sample_windows(tokens, params.steps * params.batch_size, params.context, generator)
    windows[::2, 0] = SPECIAL.index(BOS)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=params.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, params.learning_rate, total_steps=params.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for step, batch in enumerate(windows.view(params.steps, params.batch_size, params.context), start=1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(Step("training", step, params.steps, f"step {step}/{params.steps}", loss.item()))


def demo_config(params: DemoModel) -> LlamaConfig:
    """The shape of the demo model."""
    return LlamaConfig(
        vocab_size=params.vocab_size,
        hidden_size=params.hidden_size,
        intermediate_size=params.intermediate_size,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads,
        max_position_embeddings=params.context,
        initializer_range=params.initial_std,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
