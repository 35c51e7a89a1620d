"""Windows that the quantized model writes itself: text on which it can be corrected, without any more text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from apiq.adapters.unwrapped import unwrapped
from apiq.layers.dense import dense
from apiq.memory import in_parts
from apiq.progress import Progress, Step
from apiq.ram import free_ram
from apiq.refinement.cache import roomy_cache
from apiq.refinement.kept import Kept

NAME = "generated"
"""Of the windows in unfinished work."""
AT_ONCE = 256
"""Windows that are written side by side where memory allows."""
SHARE = 4
"""Keys and values of these windows may fill one part in so many of the free memory."""


@torch.no_grad()
def generated(
    model: Any, windows: Tensor, count: int, prompt: int, seed: int, dtype: torch.dtype, progress: Progress,
    kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """`count` windows (count, length) of the length of `windows` (n, length), sampled from `model` as it is.

    `dtype` is what the model computes in, and so what its keys and values take.

    Each goes on from `prompt` tokens of one of `windows`, taken at a random place. What a quantized model says is
    where it will be used, and where its own errors lead it (on-policy distillation, arXiv 2306.13649); the
    full-precision model's predictions for it need no text (LLM-QAT, arXiv 2305.17888).

    Each window has a generator of its own, so how many are written side by side, which is a matter of free memory,
    changes none of them beyond what the rounding of the arithmetic does. Batches that are in `kept` are not written
    again, and those that are written go there.

    Raises:
        ApiqError: one window at a time does not fit into the memory of the device.
    """
    length, device = windows.shape[1], next(model.parameters()).device
    prompt = min(prompt, length - 1)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(windows), (count, 1), generator=generator)
    starts = torch.randint(length - prompt + 1, (count, 1), generator=generator)
    prompts = windows[rows, starts + torch.arange(prompt)]
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    found = [] if kept is None else kept.pieces(NAME)
    begun = sum(map(len, found))

    def write(part: slice) -> None:
        batch = slice(begun + part.start, begun + part.stop)
        with dense(model, trained=False):
            rows = _sampled(model, prompts[batch].to(device), length - prompt, seeds[batch]).cpu()
        if kept is not None:
            kept.keep(NAME, batch.start, rows)
        found.append(rows)
        progress(Step("refine", batch.stop, count, f"the quantized model writes window {batch.stop}/{count}"))

    size = _at_once(model, length, device, dtype)
    if found:
        size = min(size, len(found[-1]))  # the batches of a run that was not stopped
    in_parts(count - begun, size, write, "the generation of windows")
    return torch.cat(found)


def _at_once(model: Any, length: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many windows to write side by side: a power of 2, which a little more or less free memory seldom changes."""
    config = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None)
    if queries is None:  # without attention a window keeps a state, not keys and values
        return AT_ONCE
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    each = 2 * config.num_hidden_layers * heads * width * length * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram()
    fitting = max(1, min(AT_ONCE, free // SHARE // each))
    return 1 << fitting.bit_length() - 1


def _sampled(model: Any, prompts: Tensor, more: int, seeds: list[int]) -> Tensor:
    """`more` tokens behind each of `prompts`, drawn from the whole distribution; an end of text is one like others."""
    with _without_settings(unwrapped(model)) as plain:
        return plain.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            logits_processor=LogitsProcessorList([_Drawn(seeds, prompts.device)]),
            max_new_tokens=more, pad_token_id=0,
            past_key_values=roomy_cache(plain, prompts.shape[1] + more),
        )  # fmt: skip


@contextlib.contextmanager
def _without_settings(model: Any) -> Iterator[Any]:
    """The model without its own settings of generation, such as penalties and tokens that it must not write.

    What a call of `generate` leaves open is taken from there, also where it is given another configuration.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


class _Drawn(LogitsProcessor):
    """Makes the likeliest token one that is drawn, for each row of a batch by a generator of its own.

    The arg max of logits + G, with independent G = -log E and E ~ Exp(1), is distributed as softmax(logits).
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_()
