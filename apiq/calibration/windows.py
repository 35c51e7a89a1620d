"""Token windows: a text is tokenized once, as a whole, and windows are cut out of the tokens.

The perplexity of a file by the protocol of the paper (and of its code) is that of
`consecutive_windows(tokenize(load_corpus(file).text, tokenizer), n, length)`: rows joined first, one leading token for
the whole text, none for each window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from apiq.errors import ApiqError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1_000_000
"""Characters tokenized at once: about 0.2 GB on the way."""
BATCH = 8
"""Pieces tokenized side by side."""
OVERLAP = 4_000
"""Characters that neighbouring pieces share; the seam lies in the middle of them."""
AGREEMENT = 32
"""Tokens on each side of a seam that both pieces must have in common."""


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All tokens of a text, with the tokenizer's own special tokens (Llama: one leading `<s>`).

    A text longer than `PIECE` is tokenized in overlapping pieces that are sewn together where both neighbours agree:
    the same tokens as in one call, which would take 13 GB for 90 MB of English. If they do not agree (a tokenizer
    that looks further than the overlap), it is that one call after all.

    Returns:
        Token ids, int64, shape (tokens,).
    """
    sewn = _sewn(text, tokenizer) if len(text) > PIECE and tokenizer.is_fast else None
    if sewn is None:
        sewn = np.array(tokenizer(text, truncation=False, verbose=False)["input_ids"], dtype=np.int64)
    return torch.from_numpy(sewn)


def _sewn(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """The tokens of `text` by pieces, or None where two pieces disagree."""
    firsts = range(0, len(text) - OVERLAP, PIECE)  # so that no piece is shorter than the overlap
    sewn: list[np.ndarray] = []
    ids, starts = np.empty(0, np.int64), np.empty(0, np.int64)
    for batch in (firsts[i : i + BATCH] for i in range(0, len(firsts), BATCH)):
        pieces = tokenizer(
            [text[first : first + PIECE + OVERLAP] for first in batch],
            truncation=False, verbose=False, return_attention_mask=False, return_offsets_mapping=True,
        )  # fmt: skip
        for first, next_ids, offsets in zip(batch, pieces["input_ids"], pieces["offset_mapping"], strict=True):
            next_ids = np.array(next_ids, dtype=np.int64)
            next_starts = np.array(offsets, dtype=np.int64)[:, 0] + first
            if first:
                seam = first + OVERLAP // 2
                left, right = int(np.argmax(starts >= seam)), int(np.argmax(next_starts >= seam))
                if not (_agree(ids, left, next_ids, right) and _agree(starts, left, next_starts, right)):
                    return None
                sewn.append(ids[:left])
                next_ids, next_starts = next_ids[right:], next_starts[right:]
            ids, starts = next_ids, next_starts
    return np.concatenate([*sewn, ids])


def _agree(one: np.ndarray, i: int, other: np.ndarray, j: int) -> bool:
    """Whether two sequences are the same around their positions i and j."""
    if min(i, j) < AGREEMENT:
        return False
    left, right = one[i - AGREEMENT : i + AGREEMENT], other[j - AGREEMENT : j + AGREEMENT]
    return len(left) == 2 * AGREEMENT and np.array_equal(left, right)


class Frame(NamedTuple):
    """Tokens that stand around every window, as [CLS] and [SEP] do for an encoder."""

    before: list[int]
    after: list[int]

    def inside(self, length: int) -> int:
        """Tokens of text in a window of `length`.

        Raises:
            ApiqError: there is no room for any.
        """
        size = len(self.before) + len(self.after)
        if length <= size:
            raise ApiqError(
                f"calibration.length is {length}, but the tokenizer puts {size} tokens of its own around every text; "
                f"it must be at least {size + 1}."
            )
        return length - size

    def around(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows (n, length) with these tokens around each."""
        first, last = (torch.tensor(ids, dtype=windows.dtype).expand(len(windows), -1) for ids in self)
        return torch.cat([first, windows, last], 1)


def frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer puts around every text, where it is something on both sides; else nothing.

    A decoder's windows are cut without the one token that leads its text, as in the paper. An encoder has never seen a
    text without both.
    """
    ids, special = (
        tokenizer("a", return_special_tokens_mask=True)[key] for key in ("input_ids", "special_tokens_mask")
    )
    if all(special) or not (special[0] and special[-1]):
        return Frame([], [])
    return Frame(ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :])


def sample_windows(tokens: torch.Tensor, windows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Windows at random places, each start drawn uniformly and independently (as in GPTQ and ApiQ).

    Args:
        tokens: shape (tokens,).
        windows: how many to draw.
        length: tokens in a window.
        generator: the source of the starts.

    Returns:
        Shape (windows, length).

    Raises:
        ApiqError: the text is shorter than one window.
    """
    _enough(tokens, length)
    starts = torch.randint(len(tokens) - length + 1, (windows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def consecutive_windows(tokens: torch.Tensor, windows: int, length: int) -> torch.Tensor:
    """The first windows that do not overlap; an incomplete last one is left out.

    Args:
        tokens: shape (tokens,).
        windows: how many at most; 0 for all that there are.
        length: tokens in a window.

    Returns:
        Shape (n, length) with n <= windows.

    Raises:
        ApiqError: the text is shorter than one window.
    """
    _enough(tokens, length)
    complete = len(tokens) // length
    count = min(windows, complete) if windows else complete
    return tokens[: count * length].view(count, length)


def _enough(tokens: torch.Tensor, length: int) -> None:
    if len(tokens) < length:
        raise ApiqError(
            f"the text has {len(tokens)} tokens, fewer than one window of {length}; "
            "take a longer text or a smaller length."
        )
