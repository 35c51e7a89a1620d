"""Measure the full-precision, the quantized and the finetuned model side by side."""

from functools import partial

from apiq.params import Params
from apiq.progress import Progress
from stages import EVALUATION, FINETUNED, MODEL, QUANTIZED, run


def main(params: Params, progress: Progress) -> None:
    """data/model/, data/quantized/ and data/finetuned/ to data/evaluation/."""
    from apiq.checkpoint.loading import load
    from apiq.evaluation.run import compare, metrics
    from apiq.files import new_folder, write_json

    where = {"full": MODEL, "quantized": QUANTIZED, "finetuned": FINETUNED}
    how = {"dtype": params.evaluate.dtype, "device": params.evaluate.device}
    results = compare({name: partial(load, folder, **how) for name, folder in where.items()}, params.evaluate, progress)
    with new_folder(EVALUATION) as out:
        write_json(out / "metrics.json", metrics(results))
        write_json(out / "results.json", results)


if __name__ == "__main__":
    run("evaluate", main)
