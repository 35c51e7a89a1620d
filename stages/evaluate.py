"""Measure the full-precision, the rounded, the quantized and the finetuned model side by side."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from apiq.params import Params
from apiq.progress import Progress
from stages import EVALUATION, FINETUNED, METRICS, MODEL, QUANTIZED, run


def main(params: Params, progress: Progress) -> None:
    """data/model/, data/quantized/ and data/finetuned/ to data/evaluation/; the numbers alone to data/metrics.json."""
    from apiq.checkpoint.loading import load
    from apiq.checkpoint.skipped import is_skipped
    from apiq.evaluation.run import compare, metrics
    from apiq.files import new_folder, read_json, write_json

    how = {"dtype": params.evaluate.dtype, "device": params.evaluate.device}
    models = {"full": partial(load, MODEL, **how)}
    if params.evaluate.rtn and params.quantize.method != "rtn":
        models["rtn"] = partial(load_rounded, params, **how)
    models["quantized"] = partial(load, QUANTIZED, **how)
    if not is_skipped(FINETUNED):
        models["finetuned"] = partial(load, FINETUNED, **how)
    results = compare(models, params.evaluate, progress)
    with new_folder(EVALUATION) as out:
        write_json(out / "metrics.json", metrics(results))
        write_json(out / "results.json", results)
    bits = {"effective_bits": read_json(QUANTIZED / "metrics.json")["effective_bits"]}
    write_json(METRICS, metrics(results) | bits)


def load_rounded(params: Params, **how: str) -> Any:
    """The model rounded to nearest on the grid of the quantized one."""
    from apiq.checkpoint.loading import load
    from apiq.quantization import quantize

    with tempfile.TemporaryDirectory(dir=EVALUATION.parent) as folder:
        quantize(MODEL, None, params.quantize.model_copy(update={"method": "rtn"}), Path(folder) / "rtn")
        return load(Path(folder) / "rtn", **how)


if __name__ == "__main__":
    run("evaluate", main)
