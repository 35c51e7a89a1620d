"""Several short examples in one sequence, none of which attends to another.

The positions begin again at 0 where an example begins. Where there is no attention mask, transformers reads from them
which tokens belong together, and makes what its attention takes: a mask of blocks, or offsets for flash attention.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apiq.errors import ApiqError
from apiq.finetuning.examples import IGNORED, Example

MIXED = 0.01
"""Share of the largest logit by which one example may change with another: experts round differently."""


class Packed(Example):
    """Examples one after the other, with the position of each token in its own."""

    position_ids: list[int]


def pack(examples: Sequence[Example], length: int) -> list[Packed]:
    """The examples in sequences of at most `length` tokens; none is divided.

    Best fit decreasing: from the longest to the shortest, each goes where it leaves the least room.
    """
    sequences: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each sequence, in increasing order
    for index in sorted(range(len(examples)), key=lambda index: -_size(examples[index])):
        size = _size(examples[index])
        place = bisect_left(rooms, (size, 0))
        if place == len(rooms):
            room, sequence = length, len(sequences)
            sequences.append([])
        else:
            room, sequence = rooms.pop(place)
        sequences[sequence].append(index)
        insort(rooms, (room - size, sequence))
    return [_joined([examples[index] for index in sorted(chosen)]) for chosen in sequences]


def collate_packed(batch: Sequence[Packed]) -> dict[str, Tensor]:
    """Tensors (batch, longest); what fills up a shorter sequence is an example of its own, without labels."""
    longest = max(map(_size, batch))
    short = [longest - _size(sequence) for sequence in batch]
    filled = list(zip(batch, short, strict=True))
    return {
        "input_ids": torch.tensor([sequence["input_ids"] + [0] * count for sequence, count in filled]),
        "position_ids": torch.tensor([[*sequence["position_ids"], *range(count)] for sequence, count in filled]),
        "labels": torch.tensor([sequence["labels"] + [IGNORED] * count for sequence, count in filled]),
    }


@torch.no_grad()
def refuse_what_mixes(model: nn.Module, device: torch.device) -> None:
    """Try two examples in one sequence, by the call that training makes.

    Raises:
        ApiqError: the second changes with the first: the model takes no heed of positions that begin again.
    """
    training = model.training
    model.eval()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3], [3, 1, 1, 1, 2, 3]], device=device)
    try:
        one, other = (model(input_ids=row[None], position_ids=positions).logits[:, 3:] for row in tokens)
    except TypeError:  # it has no such argument
        mixes = True
    else:
        mixes = bool((one - other).abs().max() > MIXED * one.abs().max())
    model.train(training)
    if mixes:
        raise ApiqError(
            f"finetune.packing is true, but in a {type(model).__name__} the examples of one sequence would see each "
            "other; set it to false."
        )


def _size(example: Example) -> int:
    return len(example["input_ids"])


def _joined(examples: Sequence[Example]) -> Packed:
    return {
        "input_ids": [token for example in examples for token in example["input_ids"]],
        # the first token of an example is predicted by nothing: what stands before it is another one
        "labels": [label for example in examples for label in [IGNORED, *example["labels"][1:]]],
        "position_ids": [position for example in examples for position in range(_size(example))],
    }
