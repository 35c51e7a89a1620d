"""Draw the token windows on which activations are preserved; none repeats evaluated text."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from apiq.params import Params
from apiq.progress import Progress, Step
from stages import CALIBRATION, MODEL, run

if TYPE_CHECKING:
    import torch


def main(params: Params, progress: Progress) -> None:
    """The model's tokenizer and a corpus to data/calibration/."""
    from apiq.calibration import store
    from apiq.calibration.corpora import load_corpus
    from apiq.calibration.leakage import RUN, run_length, sample_clean_windows
    from apiq.calibration.mixture import draw_windows
    from apiq.calibration.windows import consecutive_windows, tokenize
    from apiq.checkpoint.loading import read_tokenizer
    from apiq.models.source import locate

    chosen, texts = params.calibration, params.evaluate.perplexity
    tokenizer = read_tokenizer(locate(MODEL))

    total = len(texts) + 1 + len(chosen.mixture)

    def reading(source: str) -> None:
        progress(Step("calibration", next(done), total, f"reading {source}"))

    done, evaluated, left_out, repeated = itertools.count(), {}, [], RUN
    for name, text in texts.items():
        reading(text.text)
        written = load_corpus(text.text, split="test", column=text.column, join=text.join).text
        tokens = tokenize(written, tokenizer)
        repeated = max(repeated, run_length(len(written), len(tokens)))
        evaluated[name] = consecutive_windows(tokens, text.windows, text.length).flatten()

    def clean(tokens: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        windows, dropped = sample_clean_windows(tokens, count, length, generator, evaluated, repeated)
        left_out.append(dropped)
        return windows

    windows, (corpus, *others) = draw_windows(chosen, tokenizer, clean, reading)
    manifest = {
        "corpus": corpus,
        **({"mixture": others} if others else {}),
        "evaluated": sorted(evaluated),
        "left_out": sum(left_out),
        "seed": chosen.seed,
    }
    store.write(CALIBRATION, windows, manifest)
    progress(Step("calibration", total, total))


if __name__ == "__main__":
    run("calibration", main)
