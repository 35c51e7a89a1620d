"""Perplexity after quantization by every method and recipe, on one model, one set of windows and one evaluation.

    python -m benchmarks.quality MODEL --calibration TRAIN --text VALIDATION

prints a row for each and writes benchmarks/results/DATE-quality-MODEL.json with the parameters, the versions and
the machine, anew after every row. The protocol: random calibration windows of 256 tokens; perplexity on the first 200
windows of 256 tokens of each text; CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiq.calibration.corpora import load_corpus
from apiq.calibration.mixture import draw_windows
from apiq.calibration.windows import consecutive_windows, tokenize
from apiq.checkpoint.loading import load
from apiq.evaluation.perplexity import perplexity
from apiq.method_params import WITHOUT_ADAPTERS
from apiq.overrides import override
from apiq.params import RefineParams, parse
from apiq.quantization import quantize
from apiq.refinement.run import refine
from apiq.terminal import progress_bar
from benchmarks.machine import RESULTS, write

LENGTH, EVALUATED = 256, 200
CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "omniquant": {"method": "omniquant", "recipe": "paper"},
    "qlora": {"method": "qlora"},
    "loftq": {"method": "loftq"},
    "closed-form": {"method": "closed-form"},
    "apiq-lw": {"method": "apiq-lw", "recipe": "paper", "lr_adapter": 0.001},
    "paper": {"recipe": "paper"},
    "fast": {"recipe": "fast"},
    "best": {"recipe": "best"},
}
"""Settings of `quantize`: those of Tables A.1 and A.2 at 2 bits, and our own; what is not named is that of the recipe.

A name with ", refined" is the same model after `apiq refine` by its recipe.
"""
CORE = ["rtn", "apiq-lw", "paper", "best"]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--calibration", required=True, nargs="+", help="texts to draw calibration windows from, in parts"
    )
    parser.add_argument("--text", required=True, nargs="+", help="texts to measure perplexity on: PATH or NAME=PATH")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--bits", type=float, nargs="+", default=[2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    refined = ["best, refined"]
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *refined], default=CORE, metavar="METHOD",
                        help=f"of {'; '.join([*METHODS, *refined])} (default: {' '.join(CORE)})")  # fmt: skip
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more settings of quantize")
    parser.add_argument("--name", help="of the result (default: quality-MODEL)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        os.environ["APIQ_WORK"] = work
        measure(chosen)


def measure(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a seed, width, rank and method; the first is full precision."""
    full = load(chosen.model, device="cpu")
    texts = {
        name or Path(path).parent.name: consecutive_windows(_tokens(path, "test", full.tokenizer), EVALUATED, LENGTH)
        for name, _, path in (text.rpartition("=") for text in chosen.text)
    }
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any], model: Any) -> None:
        row["perplexity"] = {name: round(perplexity(model, text, 8), 4) for name, text in texts.items()}
        if rows:
            row["lost"] = {name: round(math.log(value / rows[0]["perplexity"][name]), 4)
                           for name, value in row["perplexity"].items()}  # fmt: skip
        rows.append(row)
        print(row, flush=True)
        _write(chosen, rows)

    add({"method": "full precision"}, full.model)
    for seed in chosen.seeds:
        windows = _windows(chosen, seed, full.tokenizer)
        for bits in chosen.bits:
            for number, rank in enumerate(chosen.ranks):
                for name in _wanted(chosen.methods, first=number == 0):
                    _run(chosen, windows, {"bits": bits, "rank": rank, "seed": seed}, name, add)
    return rows


def _wanted(methods: list[str], first: bool) -> list[str]:
    """The methods to run once more for another rank; a refined model comes with the one that it was made from."""
    names = dict.fromkeys(name.removesuffix(", refined") for name in methods)
    names = [name for name in names if first or METHODS[name].get("method") not in WITHOUT_ADAPTERS]
    return [f"{name}, refined" if f"{name}, refined" in methods else name for name in names]


def _run(chosen: argparse.Namespace, windows: Tensor, cell: dict[str, Any], name: str, add: Any) -> None:
    """Quantize by a method, and refine where it is asked for; a row for each."""
    method, _, more = name.partition(", ")
    given = {"group_size": chosen.group_size, "device": "cpu", **cell, **METHODS[method]}
    settings = parse(override({"quantize": given}, [f"quantize.{pair}" for pair in chosen.set])).quantize
    cell = {**cell, "bits": settings.bits}  # whole numbers as such
    with tempfile.TemporaryDirectory() as folder:
        out, refined = Path(folder) / "out", Path(folder) / "refined"
        with progress_bar("quantize") as progress:
            result = quantize(chosen.model, windows, settings, out, progress)
        kept = {key: result[key] for key in ("effective_bits", "seconds", "cpu_seconds", "peak_memory_mb")}
        add({"method": method, **cell, **kept}, load(out, device="cpu").model)
        if not more:
            return
        asked = RefineParams(recipe=settings.recipe, seed=cell["seed"], device="cpu")
        with progress_bar("refine") as progress:
            told = refine(out, chosen.model, windows, asked, refined, progress)
        both = {key: round(kept[key] + told[key], 3) for key in ("seconds", "cpu_seconds")}
        kept |= both | {key: told[key] for key in ("peak_memory_mb", "loss_first", "loss_last")}
        add({"method": name, **cell, **kept}, load(refined, device="cpu").model)


def _windows(chosen: argparse.Namespace, seed: int, tokenizer: Any) -> Tensor:
    corpus, *mixture = chosen.calibration
    drawn = {"corpus": corpus, "mixture": mixture, "windows": chosen.windows, "length": LENGTH, "seed": seed}
    return draw_windows(parse({"calibration": drawn}).calibration, tokenizer)[0]


def _tokens(source: str, split: str, tokenizer: Any) -> Tensor:
    return tokenize(load_corpus(source, split=split).text, tokenizer)


def _write(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows with all it takes to judge them."""
    protocol = {
        "model": chosen.model.name, "windows": chosen.windows, "length": LENGTH, "evaluated": EVALUATED,
        "group_size": chosen.group_size, "set": chosen.set,
        "calibration": [str(Path(*Path(source).parts[-2:])) for source in chosen.calibration],
    }  # fmt: skip
    write(chosen.name or f"quality-{chosen.model.name}", {"protocol": protocol, "rows": rows}, CPU, chosen.out)


if __name__ == "__main__":
    main()
