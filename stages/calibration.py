"""Draw the token windows on which activations are preserved; none repeats evaluated text."""

from apiq.params import Params
from apiq.progress import Progress, Step
from stages import CALIBRATION, MODEL, run


def main(params: Params, progress: Progress) -> None:
    """The model's tokenizer and a corpus to data/calibration/."""
    import torch

    from apiq.calibration import store
    from apiq.calibration.corpora import load_corpus
    from apiq.calibration.leakage import sample_clean_windows
    from apiq.calibration.windows import consecutive_windows, frame, tokenize
    from apiq.checkpoint.loading import read_tokenizer
    from apiq.models.source import locate

    chosen, texts = params.calibration, params.evaluate.perplexity
    tokenizer = read_tokenizer(locate(MODEL))

    evaluated = {}
    for done, (name, text) in enumerate(texts.items()):
        progress(Step("calibration", done, len(texts) + 1, f"reading {text.text}"))
        tokens = tokenize(load_corpus(text.text, split="test", column=text.column, join=text.join).text, tokenizer)
        evaluated[name] = consecutive_windows(tokens, text.windows, text.length).flatten()

    progress(Step("calibration", len(texts), len(texts) + 1, f"reading {chosen.corpus}"))
    corpus = load_corpus(chosen.corpus, split="train", column=chosen.column, join=chosen.join)
    tokens = tokenize(corpus.text, tokenizer)
    generator = torch.Generator().manual_seed(chosen.seed)
    around = frame(tokenizer)
    length = around.inside(chosen.length)
    windows, left_out = sample_clean_windows(tokens, chosen.windows, length, generator, evaluated)
    manifest = {
        "corpus": {"name": corpus.name, "origin": corpus.origin, "sha256": corpus.sha256, "tokens": len(tokens)},
        "evaluated": sorted(evaluated),
        "left_out": left_out,
        "seed": chosen.seed,
    }
    store.write(CALIBRATION, around.around(windows), manifest)
    progress(Step("calibration", len(texts) + 1, len(texts) + 1))


if __name__ == "__main__":
    run("calibration", main)
