"""Peak memory of quantizing a model far larger than what may be resident.

    python -m benchmarks.memory --method rtn
    python -m benchmarks.memory --method apiq-bw --windows 2 --epochs 1

writes a random Llama of 24 blocks (3.2 GB in bfloat16, shards of four blocks) to a temporary folder, or takes the
one in --model, runs `quantize` in a process of its own, and prints and writes its peak resident memory above that of
a process with the same imports, beside the size of the model and of one block.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from apiq.blocks.stream import skeleton
from apiq.files import write_json
from apiq.meter import peak_resident
from apiq.params import QuantizeParams
from apiq.quantization import quantize
from benchmarks.machine import RESULTS, alone, mb, write

SETTINGS: dict[str, Any] = {"recipe": "paper", "bits": 2, "group_size": 64, "rank": 16, "device": "cpu"}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder to use instead of a random one")
    parser.add_argument("--method", default="rtn", choices=["rtn", "apiq-bw", "apiq-lw"])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["APIQ_WORK"] = str(folder / "work")
        model = chosen.model or alone(write_random_llama, folder / "model", chosen.blocks, chosen.hidden)
        params = QuantizeParams(**SETTINGS, method=chosen.method, epochs=chosen.epochs)
        imports = alone(peak_resident)
        used, cost = alone(quantized, model, params, [chosen.windows, chosen.length], folder / "out")
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    protocol = {name: value for name, value in vars(chosen).items() if name not in ("out", "model")}
    facts = {
        "model_mb": mb(size), "imports_mb": mb(imports), "above_imports_mb": mb(used - imports), "cost": cost,
        "protocol": protocol,
    }  # fmt: skip
    print(facts)
    write(f"memory-{chosen.method}", facts, torch.device("cpu"), chosen.out)


def quantized(model: Path, params: QuantizeParams, shape: list[int], out: Path) -> tuple[int, dict[str, Any]]:
    """Peak resident bytes of this process once it has quantized on random windows, and what that took."""
    size = LlamaConfig.from_pretrained(model).vocab_size
    windows = torch.randint(0, size, shape, generator=torch.Generator().manual_seed(0))
    result = quantize(model, None if params.method == "rtn" else windows, params, out)
    return peak_resident(), {name: result[name] for name in ("seconds", "cpu_seconds")}


def write_random_llama(folder: Path, blocks: int, hidden: int, inner: int | None = None) -> Path:
    """A Llama with random weights in bfloat16, written shard by shard so that it is never in memory as a whole."""
    heads = max(hidden // 128, 1)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner or hidden * 7 // 2, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, value in skeleton(config, torch.bfloat16).state_dict().items():
        parts = name.split(".")
        shard = f"blocks-{int(parts[2]) // 4:02d}" if parts[1] == "layers" else "rest"
        shards.setdefault(f"{shard}.safetensors", {})[name] = value.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in shards.items():
        save_file({name: _random(shape, generator) for name, shape in shapes.items()}, folder / file, {"format": "pt"})
    places = {name: file for file, shapes in shards.items() for name in shapes}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return folder


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


if __name__ == "__main__":
    main()
