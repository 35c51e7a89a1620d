"""Measure the full-precision, the rounded, the quantized, the refined and the finetuned model side by side."""

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from apiq.params import Params
from apiq.progress import Progress
from stages import EVALUATION, FINETUNED, METRICS, MODEL, QUANTIZED, REFINED, run


def main(params: Params, progress: Progress) -> None:
    """The models of data/ to data/evaluation/; the numbers alone to data/metrics.json."""
    from apiq.checkpoint.loading import load
    from apiq.checkpoint.skipped import is_skipped
    from apiq.evaluation.errors import compare_errors, summary, write_errors
    from apiq.evaluation.run import compare, metrics, rounded
    from apiq.files import new_folder, read_json, write_json

    chosen = params.evaluate
    with nearest(params) as rtn:
        quantized = {**rtn, "quantized": QUANTIZED}
        refined = {"refined": REFINED} if params.refine.epochs else {}
        tuned = {} if is_skipped(FINETUNED) else {"finetuned": FINETUNED}
        folders = {"full": MODEL, **quantized, **refined, **tuned}
        how = {"dtype": chosen.dtype, "device": chosen.device}
        results = compare({name: partial(load, place, **how) for name, place in folders.items()}, chosen, progress)
        errors = compare_errors(MODEL, quantized, chosen, progress) if chosen.errors else {}
        for name, folder in rtn.items():
            results[name]["effective_bits"] = read_json(folder / "metrics.json")["effective_bits"]
    for name, rows in errors.items():
        results[name]["errors"] = rounded(summary(rows))
    with new_folder(EVALUATION) as out:
        write_errors(out / "errors.csv", errors)
        write_json(out / "metrics.json", metrics(results))
        write_json(out / "results.json", results)
    bits = {"effective_bits": read_json(QUANTIZED / "metrics.json")["effective_bits"]}
    write_json(METRICS, metrics(results) | bits)


@contextlib.contextmanager
def nearest(params: Params) -> Iterator[dict[str, Path]]:
    """`rtn` -> a folder, for the block, with the model rounded to nearest on the same grid; nothing if not wanted."""
    if not params.evaluate.rtn or params.quantize.method == "rtn":
        yield {}
        return
    from apiq.quantization import quantize

    with tempfile.TemporaryDirectory(dir=EVALUATION.parent) as folder:
        out = Path(folder) / "rtn"
        quantize(MODEL, None, params.quantize.model_copy(update={"method": "rtn"}), out)
        yield {"rtn": out}


if __name__ == "__main__":
    run("evaluate", main)
