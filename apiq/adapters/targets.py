"""Which linears of a block carry adapters: all, those of the attention or of the feed-forward part, or named ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from apiq.errors import ApiqError

Shapes = Mapping[str, tuple[int, int]]
"""Shape (out, in) of each linear of a block by its name inside it, in the order of the block."""

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERT = re.compile(r"(^|\.)\d+\.")


def shapes(linears: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    """The shapes of linears; all that adapters need to know of them beforehand."""
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def largest(blocks: Iterable[Shapes]) -> int:
    """The number of weights in linears of the block that has most of them."""
    return max(sum(out * columns for out, columns in block.values()) for block in blocks)


def select(linears: Shapes, chosen: Iterable[str], strict: bool = True) -> list[str]:
    """The names of the linears of a block that `chosen` asks for, in the order of the block.

    Each entry of `chosen` is `all`, `attn` (what lies in a module called attention), `ffn` (the rest of a
    block that has an attention), the name of a linear as in `self_attn.q_proj`, or the end of names, `q_proj`.

    Raises:
        ApiqError: with `strict`, an entry finds nothing.
    """
    found: set[str] = set()
    for entry in chosen:
        matching = _matching(linears, entry)
        if strict and not matching:
            raise ApiqError(_nothing(linears, entry))
        found.update(matching)
    return [name for name in linears if name in found]


def attention(linears: Shapes) -> list[str]:
    """The linears of the attention; none where the block has no attention that can be told by its name."""
    return [name for name in linears if _ATTENTION.search(name)]


def feed_forward(linears: Shapes) -> list[str]:
    """The linears outside the attention; none where no attention is found to tell them from."""
    return [name for name in linears if not _ATTENTION.search(name)] if attention(linears) else []


def outputs(linears: Shapes) -> list[str]:
    """The linears whose output is that of the attention or of the feed-forward part: o_proj and down_proj in Llama.

    They are the last of their part that map to the width of the block, which is what most linears read.
    The feed-forward part of a mixture of experts has none: its output is a sum over experts.
    """
    width = Counter(columns for _, columns in linears.values()).most_common(1)[0][0]
    parts = [attention(linears), [] if _mixture(linears) else feed_forward(linears)]
    ends = [[name for name in part if linears[name][0] == width] for part in parts]
    return [names[-1] for names in ends if names]


def _mixture(linears: Shapes) -> bool:
    return any(_EXPERT.search(name) for name in feed_forward(linears))


def _matching(linears: Shapes, entry: str) -> list[str]:
    groups = {"all": list, "attn": attention, "ffn": feed_forward}
    if entry in groups:
        return list(groups[entry](linears))
    return [name for name in linears if name == entry or name.endswith(f".{entry}")]


def _nothing(linears: Shapes, entry: str) -> str:
    known = ", ".join(linears)
    if entry in ("attn", "ffn"):
        return (
            f"quantize.adapter_targets is {entry}, but no linear of a block lies in a module called attention that "
            f"would tell the two apart; it should be all, or names out of {known}."
        )
    return f"quantize.adapter_targets names {entry}, which no linear of a block is called; there are {known}."
