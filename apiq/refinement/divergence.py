"""The distance of the quantized model's predictions from those of the full-precision model."""

from __future__ import annotations

from torch import Tensor

LEAST = 1e-6
"""The smallest probability that the tokens outside the top k are taken to have together."""


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """Log probabilities (..., k), float32, of the k likeliest tokens, and which they are (int32).

    The second is None, and the first in the order of the vocabulary, where k is all of it.
    """
    logs = logits.float().log_softmax(-1)
    if k >= logs.shape[-1]:
        return logs, None
    values, index = logs.topk(k, dim=-1)
    return values, index.int()


def divergence(logits: Tensor, teacher: Tensor, index: Tensor | None) -> Tensor:
    """Mean over all positions of KL(p || q), in nats: q = softmax(`logits`) (..., vocabulary), p as `top` gives it.

    Where only the top k of p are known, all other tokens count as one: a lower bound of the divergence, which is
    0 exactly where q has the top k and their sum right.
    """
    logs = logits.float().log_softmax(-1)
    if index is None:
        return (teacher.exp() * (teacher - logs)).sum(-1).mean()
    logs = logs.gather(-1, index.long())
    known = (teacher.exp() * (teacher - logs)).sum(-1)
    rest, own_rest = _rest(teacher), _rest(logs)
    return (known + rest * (rest.log() - own_rest.log())).mean()


def _rest(logs: Tensor) -> Tensor:
    """The probability of all tokens but those of `logs` (..., k)."""
    return (1 - logs.exp().sum(-1)).clamp(min=LEAST)
