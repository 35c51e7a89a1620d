"""Peak memory of quantizing a model far larger than what may be resident.

    python -m benchmarks.memory --method rtn
    python -m benchmarks.memory --method apiq-bw --windows 2 --epochs 1

writes a random Llama of 24 blocks (3.2 GB in bfloat16, shards of four blocks) to a temporary folder, or takes the
one in --model, runs `quantize` in a process of its own, and prints and writes its peak resident memory above that of
a process with the same imports, beside the size of the model and of one block.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from apiq.blocks.stream import skeleton
from apiq.files import write_json

IMPORTS = "import apiq.quantization, apiq.methods, transformers.models.llama.modeling_llama, peft.tuners.lora"
QUANTIZE = """
import json, sys
from pathlib import Path
import torch
from apiq.params import QuantizeParams
from apiq.quantization import quantize
facts = json.loads(sys.argv[1])
generator = torch.Generator().manual_seed(0)
windows = torch.randint(0, facts["vocabulary"], (facts["windows"], facts["length"]), generator=generator)
params = QuantizeParams(**facts["params"])
quantize(facts["model"], None if params.method == "rtn" else windows, params, facts["out"])
"""


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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = chosen.model or write_random_llama(Path(folder) / "model", chosen.blocks, chosen.hidden)
        result = measure(model, chosen, Path(folder))
    print(result)
    date = datetime.date.today().isoformat()
    write_json(chosen.out / f"{date}-memory-{chosen.method}.json", {"date": date, **result})


def measure(model: Path, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory in 2^20 bytes of a quantization of `model`, above that of its imports."""
    import json

    config = LlamaConfig.from_pretrained(model)
    params = {
        "recipe": "paper",
        "method": chosen.method,
        "bits": 2,
        "group_size": 64,
        "rank": 16,
        "epochs": chosen.epochs,
    }
    facts = {
        "model": str(model), "vocabulary": config.vocab_size, "windows": chosen.windows, "length": chosen.length,
        "params": {**params, "device": "cpu"}, "out": str(folder / "out"),
    }  # fmt: skip
    bare, _ = peak([sys.executable, "-c", IMPORTS], folder)
    used, seconds = peak([sys.executable, "-c", QUANTIZE, json.dumps(facts)], folder)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {
        "model_mb": round(size / 2**20, 1),
        "imports_mb": round(bare, 1),
        "above_imports_mb": round(used - bare, 1),
        "seconds": round(seconds, 1),
        "parameters": facts["params"],
        "windows": [chosen.windows, chosen.length],
        "blocks": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def peak(command: list[str], folder: Path) -> tuple[float, float]:
    """Peak resident memory in 2^20 bytes and seconds of user and system time of `command`."""
    process = subprocess.Popen(command, env={**os.environ, "APIQ_WORK": str(folder / "work")})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the measured process ended with status {status}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), usage.ru_utime + usage.ru_stime


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
