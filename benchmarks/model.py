"""A whole model of the shape of Llama-2-7B, random weights, by ApiQ-bw and ApiQ-lw, beside the floor of its products.

    python -m benchmarks.model --device cuda                        # 128 windows of 2048 tokens, 20 epochs, 2 blocks
    python -m benchmarks.model --hidden 256 --inner 688 --windows 8 --length 128 --epochs 2      # small, on a CPU

Only the first `--blocks` of `--of` blocks are there and quantized, everything else is as in `apiq quantize`: 2 bits,
group size 64, rank 64, batch 1, activations and blocks written to disk. All blocks are alike, so the whole takes
the seconds before the first block, those of the first, and the mean of the others for each of the rest. The floor is
the time of the matrix products alone, each shape timed by itself: forward, gradient of the input and
gradient of the weight in every step, forward for teacher, targets and propagation.
Writes benchmarks/results/DATE-model-DEVICE.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from apiq.device import pick_dtype
from apiq.params import QuantizeParams
from apiq.progress import Step
from apiq.quantization import quantize
from benchmarks.machine import RESULTS, fastest, write
from benchmarks.memory import write_random_llama


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--blocks", type=int, default=2, help="how many are measured; at least 2")
    parser.add_argument("--of", type=int, default=32, help="blocks of the whole model")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["apiq-bw", "apiq-lw"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["APIQ_WORK"] = str(Path(folder) / "work")
        model = write_random_llama(Path(folder) / "model", chosen.blocks, chosen.hidden, chosen.inner)
        rows = [measure(model, method, chosen, Path(folder)) for method in chosen.methods]
    protocol = {name: value for name, value in vars(chosen).items() if name not in ("out", "methods", "threads")}
    write(f"model-{device.type}", {"protocol": protocol, "rows": rows}, device, chosen.out)


def measure(model: Path, method: str, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds by block and of the whole, peak memory, and the floor."""
    device = torch.device(chosen.device)
    settings: dict[str, Any] = {
        "recipe": "paper",
        "method": method,
        "device": chosen.device,
        "rank": chosen.rank,
        "epochs": chosen.epochs,
    }
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 32000, (chosen.windows, chosen.length), generator=generator)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start, finished = clock(), [0.0]
    begun: list[float] = []

    def watch(step: Step) -> None:
        begun.append(clock() - start)  # the first report comes before any block
        if step.done == len(finished) and step.detail.startswith("block"):
            finished.append(clock() - start)

    result = quantize(model, windows, QuantizeParams(**settings), folder / method, watch)
    blocks = [finished[1] - begun[0], *(b - a for a, b in itertools.pairwise(finished[1:]))]
    later = sum(blocks[1:]) / len(blocks[1:])
    floor = product_seconds(method, chosen, device)
    row = {
        "method": method,
        "before_blocks_s": round(begun[0], 2),
        "block_s": [round(value, 2) for value in blocks],
        "whole_s": round(begun[0] + blocks[0] + later * (chosen.of - 1), 1),
        "floor_block_s": round(floor, 2),
        "block_to_floor": round(later / floor, 3),
        "peak_memory_mb": result["peak_memory_mb"],
        "peak_gpu_memory_mb": result.get("peak_gpu_memory_mb"),
        "loss": [[block["loss_first"], block["loss_last"]] for block in result["blocks"]],
    }
    print(row, flush=True)
    return row


def product_seconds(method: str, chosen: argparse.Namespace, device: torch.device) -> float:
    """Seconds that the matrix products of one block take by themselves."""
    dtype = pick_dtype("auto", device)
    hidden, inner = chosen.hidden, chosen.inner
    forward, backward = 0.0, 0.0
    for count, (out, columns) in ((4, (hidden, hidden)), (2, (inner, hidden)), (1, (hidden, inner))):
        X = torch.randn(chosen.length, columns, device=device, dtype=dtype)
        W = torch.randn(out, columns, device=device, dtype=dtype)
        G = torch.randn(chosen.length, out, device=device, dtype=dtype)
        works = {
            "forward": lambda X=X, W=W: X @ W.t(),
            "input": lambda G=G, W=W: G @ W,
            "weight": lambda G=G, X=X: G.t() @ X,
        }
        taken = fastest(works, device, 5)
        forward += count * taken["forward"]
        backward += count * (taken["weight"] + (taken["input"] if method == "apiq-bw" else taken["forward"]))
    steps = chosen.windows * chosen.epochs
    around = 4 * chosen.windows  # teacher, own target, error at the start, propagation
    return steps * (forward + backward) + around * forward


if __name__ == "__main__":
    main()
