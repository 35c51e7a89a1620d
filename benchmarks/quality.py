"""Perplexity after quantization by every method, on one model, one set of windows and one evaluation.

    python -m benchmarks.quality MODEL --calibration TRAIN --text VALIDATION

prints a table and writes benchmarks/results/DATE-quality-MODEL.json with the parameters, the versions and
the machine. The protocol: random calibration windows; perplexity on the first 200 windows of 256 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from apiq.calibration.corpora import load_corpus
from apiq.calibration.windows import consecutive_windows, sample_windows, tokenize
from apiq.checkpoint.loading import load
from apiq.evaluation.perplexity import perplexity
from apiq.files import write_json
from apiq.params import QuantizeParams
from apiq.quantization import quantize
from apiq.terminal import progress_bar

LENGTH, EVALUATED = 256, 200
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "apiq-lw r16": {"recipe": "paper", "method": "apiq-lw", "rank": 16, "lr_adapter": 0.001},
    "apiq-bw r16": {"recipe": "paper", "method": "apiq-bw", "rank": 16},
    "apiq-bw r64": {"recipe": "paper", "method": "apiq-bw", "rank": 64},
    "apiq-bw r16, recipe best": {"method": "apiq-bw", "rank": 16},
}
"""Settings of Tables A.1 and A.2 at 2 bits, and our own; what is not named is that of the recipe."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True, help="text to draw calibration windows from")
    parser.add_argument("--text", required=True, help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(chosen)
    write(chosen, rows)


def measure(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method, bits and seed; the first is full precision."""
    full = load(chosen.model, device="cpu")
    evaluated = _tokens(chosen.text, "test", full.tokenizer)
    evaluated = consecutive_windows(evaluated, EVALUATED, LENGTH)
    tokens = _tokens(chosen.calibration, "train", full.tokenizer)
    rows: list[dict[str, Any]] = [{"method": "full precision", "perplexity": perplexity(full.model, evaluated, 8)}]
    print(rows[0], flush=True)
    for seed in chosen.seeds:
        generator = torch.Generator().manual_seed(seed)
        windows = sample_windows(tokens, chosen.windows, LENGTH, generator)
        for bits in chosen.bits:
            for name in chosen.methods:
                fixed = {"bits": bits, "group_size": chosen.group_size, "seed": seed, "device": "cpu"}
                rows.append({"method": name, **_row(chosen.model, windows, evaluated, {**fixed, **METHODS[name]})})
                print(rows[-1], flush=True)
    return rows


def _row(model: Path, windows: torch.Tensor, evaluated: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, progress_bar("quantize") as progress:
        result = quantize(model, windows, QuantizeParams(**settings), Path(folder) / "out", progress)
        value = perplexity(load(Path(folder) / "out", device="cpu").model, evaluated, 8)
    kept = ("effective_bits", "seconds", "cpu_seconds", "peak_memory_mb")
    return {"bits": settings["bits"], "seed": settings["seed"], "perplexity": value, **{k: result[k] for k in kept}}


def _tokens(source: str, split: str, tokenizer: Any) -> torch.Tensor:
    return tokenize(load_corpus(source, split=split).text, tokenizer)


def write(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows with all it takes to judge them."""
    date = datetime.date.today().isoformat()
    versions = {name: importlib.metadata.version(name) for name in ("apiq", "torch", "transformers", "peft")}
    facts = {
        "date": date,
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "versions": versions,
        "protocol": {
            "windows": chosen.windows,
            "length": LENGTH,
            "evaluated": EVALUATED,
            "group_size": chosen.group_size,
        },
        "rows": rows,
    }
    path = chosen.out / f"{date}-quality-{chosen.model.name}.json"
    write_json(path, facts)
    print(f"written to {path}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
