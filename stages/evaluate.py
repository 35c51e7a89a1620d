"""Measure the full-precision, the rounded, the quantized, the refined and the finetuned model side by side."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from apiq.params import Params
from apiq.progress import Progress, naming
from stages import CALIBRATION, EVALUATION, FINETUNED, METRICS, MODEL, QUANTIZED, REFINED, run


def main(params: Params, progress: Progress) -> None:
    """The models of data/ to data/evaluation/; the numbers alone to data/metrics.json."""
    from apiq.checkpoint.loading import load
    from apiq.checkpoint.skipped import is_skipped
    from apiq.evaluation.errors import compare_errors, summary, write_errors
    from apiq.evaluation.run import compare, metrics, rounded
    from apiq.files import new_folder, read_json, write_json
    from apiq.work import alone, work_folder

    chosen = params.evaluate
    trained = {"quantized": QUANTIZED}
    trained |= {"refined": REFINED} if params.refine.epochs else {}
    trained |= {} if is_skipped(FINETUNED) else {"finetuned": FINETUNED}
    with alone(work_folder(identity(params, trained))) as work:
        rtn = nearest(params, work, progress)
        folders = {"full": MODEL, **rtn, **trained}
        how = {"dtype": chosen.dtype, "device": chosen.device}
        models = {name: partial(load, place, **how) for name, place in folders.items()}
        results = compare(models, chosen, progress, kept=work)
        compared = {**rtn, "quantized": QUANTIZED}
        errors = compare_errors(MODEL, compared, chosen, progress) if chosen.errors else {}
        for name, place in {**rtn, **trained}.items():
            results[name]["effective_bits"] = bits_on_disk(place)
        for name, rows in errors.items():
            results[name]["errors"] = rounded(summary(rows))
        with new_folder(EVALUATION) as out:
            write_errors(out / "errors.csv", errors)
            write_json(out / "metrics.json", metrics(results))
            write_json(out / "results.json", results)
        bits = {"effective_bits": read_json(QUANTIZED / "metrics.json")["effective_bits"]}
        write_json(METRICS, metrics(results) | bits)
        shutil.rmtree(work)


def identity(params: Params, trained: dict[str, Path]) -> dict[str, Any]:
    """What decides the results: those of a model that is done are taken up by a run that goes on."""
    from apiq.checkpoint import manifest
    from apiq.files import sha256
    from apiq.work import code_version

    deciding = params.model_dump(include={"evaluate", "quantize"})
    models = {name: sha256(place / manifest.NAME) for name, place in trained.items()}
    return {"stage": "evaluate", "code": code_version(), "models": models, **deciding}


def nearest(params: Params, work: Path, progress: Progress) -> dict[str, Path]:
    """`rtn` -> the folder in `work` of the model rounded to nearest on the same grids; nothing if not wanted."""
    if not params.evaluate.rtn or params.quantize.method == "rtn":
        return {}
    from apiq.calibration.store import read
    from apiq.quantization import quantize

    out = work / "rtn"
    if not out.is_dir():
        rounding = params.quantize.model_copy(update={"method": "rtn", "candidate_ranks": []})
        quantize(MODEL, read(CALIBRATION) if rounding.calibrated else None, rounding, out, naming("rtn", progress))
    return {"rtn": out}


def bits_on_disk(folder: Path) -> float:
    """Effective bits of a quantized model, or of a finetuned one with its own adapters on its base."""
    from apiq.checkpoint import manifest
    from apiq.checkpoint.accounting import effective_bits

    base = (manifest.read(folder) or {}).get("base")
    return effective_bits(folder if base is None else folder / base, folder / "adapter").total


if __name__ == "__main__":
    run("evaluate", main)
