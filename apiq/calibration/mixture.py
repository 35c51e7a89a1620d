"""The calibration windows: drawn from one corpus, or from several in equal parts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from apiq.calibration.corpora import load_corpus
from apiq.calibration.windows import frame, sample_windows, tokenize
from apiq.params import CalibrationParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Draw = Callable[[torch.Tensor, int, int, torch.Generator], torch.Tensor]
"""Windows (n, length) of a text, from its tokens, n, length and the source of the starts."""


def draw_windows(
    chosen: CalibrationParams,
    tokenizer: PreTrainedTokenizerBase,
    draw: Draw = sample_windows,
    reading: Callable[[str], None] = lambda source: None,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Cut the calibration windows with a tokenizer.

    Those of several corpora stand in random order, so that steps and passes see all of them.

    Args:
        chosen: the corpora, the number of windows, their length and the seed.
        tokenizer: of the model.
        draw: how windows are drawn from the tokens of a text.
        reading: told which corpus comes next.

    Returns:
        Windows, int64, shape (windows, length), and for each corpus its name, origin, hash, tokens and windows.

    Raises:
        ApiqError: a corpus is missing, damaged or shorter than a window.
    """
    generator, around = torch.Generator().manual_seed(chosen.seed), frame(tokenizer)
    length = around.inside(chosen.length)
    drawn, origins = [], []
    for source, count in counts(chosen).items():
        reading(source)
        corpus = load_corpus(source, split="train", column=chosen.column, join=chosen.join)
        tokens = tokenize(corpus.text, tokenizer)
        drawn.append(draw(tokens, count, length, generator))
        origins.append({
            "name": corpus.name, "origin": corpus.origin, "sha256": corpus.sha256, "tokens": len(tokens),
            "windows": count,
        })  # fmt: skip
    windows = torch.cat(drawn)
    if len(drawn) > 1:
        windows = windows[torch.randperm(len(windows), generator=generator)]
    return around.around(windows), origins


def counts(chosen: CalibrationParams) -> dict[str, int]:
    """How many windows come from each corpus: equal parts, larger by one from the first on where they do not divide."""
    sources = [chosen.corpus, *chosen.mixture]
    return dict(Counter(itertools.islice(itertools.cycle(sources), chosen.windows)))
