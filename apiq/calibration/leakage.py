"""Calibration and evaluation kept apart: a window that shares a long verbatim run with evaluated text is not used.

A run is 50 tokens, the length from which Lee et al. (arXiv 2107.06499) take equal text for a copy and not for chance,
or 200 characters where a token is shorter than theirs: a tokenizer of characters has 50 tokens in common by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from apiq.calibration.windows import sample_windows
from apiq.errors import ApiqError

RUN, CHARACTERS = 50, 200
"""Least tokens and least characters in a run; a shorter window counts as a whole."""
TOLERATED = 0.05
"""Share of the drawn windows that may be left out."""

_BASE = np.uint64(0x9E3779B97F4A7C15)


def sample_clean_windows(
    tokens: torch.Tensor,
    windows: int,
    length: int,
    generator: torch.Generator,
    evaluated: Mapping[str, torch.Tensor],
    run: int = RUN,
) -> tuple[torch.Tensor, int]:
    """Random windows, as `sample_windows` draws them, that share no run of tokens with evaluated text.

    Windows that do are left out and others drawn for them.

    Args:
        tokens: the calibration text, shape (tokens,).
        windows: how many to draw.
        length: tokens in a window.
        generator: the source of the starts.
        evaluated: the tokens of each evaluated text, shape (tokens,), by name; of the same tokenizer.
        run: tokens in a run, see `run_length`.

    Returns:
        The windows, shape (windows, length), and the number of those left out.

    Raises:
        ApiqError: the text is shorter than one window, or more than 5 % of the windows drawn from it are left out.
    """
    run = min(run, length)
    known = {name: np.unique(_hashes(text.numpy()[None], run)) for name, text in evaluated.items()}
    clean = torch.empty(0, length, dtype=torch.long)
    drawn = 0
    while len(clean) < windows:
        new = sample_windows(tokens, windows - len(clean), length, generator)
        drawn += len(new)
        hashes = _hashes(new.numpy(), run)
        shared = {name: np.isin(hashes, runs).any(axis=1) for name, runs in known.items()}
        fresh = ~np.logical_or.reduce([np.zeros(len(new), bool), *shared.values()])
        clean = torch.cat([clean, new[torch.from_numpy(fresh)]])
        if drawn - len(clean) > TOLERATED * drawn:
            most = max(shared, key=lambda name: int(shared[name].sum()))
            raise ApiqError(
                f"{drawn - len(clean)} of {drawn} windows drawn for calibration repeat {run} tokens or more of "
                f"evaluated text ({most}); calibrate on another corpus or another split."
            )
    return clean, drawn - len(clean)


def run_length(characters: int, tokens: int) -> int:
    """Tokens in a run for a tokenizer that makes so many `tokens` of so many `characters`."""
    return max(RUN, math.ceil(CHARACTERS * tokens / max(characters, 1)))


def _hashes(tokens: np.ndarray, run: int) -> np.ndarray:
    """The hash of every run: token ids (n, L) to 64-bit polynomials (n, L - run + 1)."""
    count = max(tokens.shape[1] - run + 1, 0)
    values = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros((len(tokens), count), dtype=np.uint64)
    for offset in range(run):
        hashes = hashes * _BASE + values[:, offset : offset + count]
    return hashes
