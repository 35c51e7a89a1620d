"""Training examples: token ids with the labels that the loss is taken on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import torch

from apiq.errors import ApiqError

IGNORED = -100
"""Label of a token that is read but not learned; PyTorch's cross-entropy leaves it out."""

Item = TypeVar("Item")


class Example(TypedDict):
    """One sequence."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Examples:
    """What to train on, what to measure on, and where they come from."""

    train: list[Example]
    held_out: list[Example]
    counts: dict[str, int]
    """How many examples there are of each kind."""
    source: dict[str, Any]
    """Name and SHA-256 of what they were made from."""


def whole(tokens: Sequence[int]) -> Example:
    """Every token is learned."""
    return {"input_ids": list(tokens), "labels": list(tokens)}


def answer_only(prompt: Sequence[int], answer: Sequence[int], length: int) -> Example | None:
    """The prompt is read, the answer is learned; the end of what is longer than `length` is cut off.

    Returns:
        None if nothing of the answer is left to be predicted.
    """
    tokens = [*prompt, *answer][:length]
    labels = [*[IGNORED] * len(prompt), *answer][:length]
    if all(label == IGNORED for label in labels[1:]):  # the first token has no predecessor that predicts it
        return None
    return {"input_ids": tokens, "labels": labels}


def split(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Set a share of the items, at least one, aside at random; both parts keep their order.

    Equal items stay together: what is held out is never trained on.

    Raises:
        ApiqError: there are fewer than two items that differ.
    """
    kinds: dict[bytes, list[int]] = {}
    for index, item in enumerate(items):
        kinds.setdefault(_digest(item), []).append(index)
    if len(kinds) < 2:
        raise ApiqError(
            f"there is {len(kinds)} example to train on (equal ones count as one), and one must be held out; "
            "give more text or a smaller finetune.length."
        )
    count, groups = max(1, round(share * len(kinds))), list(kinds.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {index for group in order[:count] for index in groups[group]}
    return [item for i, item in enumerate(items) if i not in held_out], [items[i] for i in sorted(held_out)]


def repeated(items: Sequence[Item]) -> int:
    """How many of the items are there already."""
    return len(items) - len(set(map(_digest, items)))


def _digest(item: Any) -> bytes:
    """The same for equal items, and a few bytes where the item is a window of thousands of tokens."""
    return hashlib.sha256(repr(item).encode()).digest()


def collate(batch: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Tensors (batch, longest), padded on the right with token 0, which the attention mask and the labels hide."""
    longest = max(len(example["input_ids"]) for example in batch)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([example[key] + [value] * (longest - len(example[key])) for example in batch])

    lengths = torch.tensor([len(example["input_ids"]) for example in batch])
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": padded("labels", IGNORED),
    }
