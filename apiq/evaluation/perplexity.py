"""Perplexity on windows of text, as the ApiQ paper and its peers report it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from apiq.adapters.unwrapped import unwrapped
from apiq.errors import ApiqError
from apiq.progress import Progress, Step, silent


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, windows: torch.Tensor, batch_size: int = 1, progress: Progress = silent
) -> float:
    """exp(mean over the windows of the mean cross-entropy, in nats, of the L - 1 tokens that have a predecessor).

    No token is put in front of a window. Since every window predicts equally many tokens, this is
    exp of the mean over all predicted tokens (section 5.2 of arXiv 2402.05147, OmniQuant's protocol).
    The reductions are in float32 whatever the model computes in, and the number of windows in a
    batch changes the result by rounding only.

    Args:
        model: a causal language model, on its device.
        windows: token ids (n, L), int64.
        batch_size: windows in one forward pass.
        progress: told after every batch, with the mean cross-entropy so far.

    Raises:
        ApiqError: the model does not predict the next token, there is no window, a window is longer than the
            context of the model, a token is not in its vocabulary, or a window has a loss that is not finite.
    """
    n = len(windows)
    require_causal(model)
    refuse(model, windows)
    device = next(model.parameters()).device
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, n, batch_size):
            batch = windows[start : start + batch_size].to(device)  # (batch, L)
            logits = model(input_ids=batch, use_cache=False).logits  # (batch, L, vocabulary)
            losses += torch.stack([_loss(*pair) for pair in zip(logits, batch, strict=True)]).tolist()
            for index in range(start, len(losses)):
                if not math.isfinite(losses[index]):
                    raise ApiqError(
                        f"the model gives logits that are not finite on window {index} of {n}; "
                        "its weights are damaged, or its arithmetic overflows: try dtype float32."
                    )
            progress(Step("perplexity", len(losses), n, f"window {len(losses)}/{n}", math.fsum(losses) / len(losses)))
    finally:
        model.train(was_training)
    mean = math.fsum(losses) / n
    if mean > math.log(torch.finfo(torch.float64).max):
        raise ApiqError(
            f"the mean loss is {mean:.6g} nats a token, whose perplexity is no number; the model is broken."
        )
    return math.exp(mean)


def require_causal(model: Any) -> None:
    """Refuse a model that does not predict the next token, as encoders and classifiers.

    Raises:
        ApiqError: it is one.
    """
    base = unwrapped(model)
    if not base.can_generate():
        raise ApiqError(
            f"{type(base).__name__} does not predict the next token; perplexity, tasks and finetuning are for models "
            "that do."
        )


def context_length(model: torch.nn.Module) -> int | None:
    """Longest sequence that the model takes, in tokens; None where its config names no bound."""
    return getattr(text_config(model), "max_position_embeddings", None)


def text_config(model: torch.nn.Module) -> Any:
    """The part of the model's config that describes its language model."""
    return model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def refuse(model: torch.nn.Module, windows: torch.Tensor) -> None:
    """Refuse windows (n, L) that the model cannot score.

    Raises:
        ApiqError: as `perplexity` says.
    """
    n, length = windows.shape
    if n == 0 or length < 2:
        raise ApiqError(f"perplexity needs at least one window of at least 2 tokens; there are {n} of {length}.")
    context = context_length(model)
    if context is not None and length > context:
        raise ApiqError(f"the windows have {length} tokens; the context of the model takes at most {context}.")
    if int(windows.min()) < 0:
        raise ApiqError(f"the windows hold {int(windows.min())}, which is no token; every position must be one here.")
    vocabulary = text_config(model).vocab_size
    if int(windows.max()) >= vocabulary:
        raise ApiqError(
            f"the windows hold token {int(windows.max())}, and the model knows {vocabulary} tokens; "
            "the tokenizer is not the one of this model."
        )


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of one window: logits (L, vocabulary) predict tokens (L,) shifted by one."""
    return functional.cross_entropy(logits[:-1].float(), tokens[1:])
