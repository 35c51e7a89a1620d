"""Peak memory of finetuning a packed Llama of about 1B parameters, beside what has to be there.

    python -m benchmarks.finetuning                                     # 16 blocks of width 2048, 2 bits, rank 16
    python -m benchmarks.finetuning --blocks 2 --hidden 256 --inner 704 # small

writes a random Llama (bfloat16 on disk), quantizes it by apiq-bw on one short window, finetunes it for some steps
with activation checkpointing in a process of its own, and sets the peak of its resident memory, above that of a
process with the same imports, beside

    packed size + 4 x adapters (weight, gradient, two moments) + activations of one block + one dequantized linear

The packed size is that of the folder without its adapters; the activations are what autograd keeps of the last block.
Writes benchmarks/results/DATE-finetuning-DTYPE.json.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from apiq.blocks.architecture import find_blocks
from apiq.checkpoint.loading import load, read_tokenizer
from apiq.finetuning.run import finetune
from apiq.layers.packed import PackedLinear
from apiq.meter import peak_resident
from apiq.params import FinetuneParams, QuantizeParams
from apiq.quantization import quantize
from benchmarks.machine import RESULTS, alone, mb, write
from benchmarks.memory import write_random_llama

BOUND = 1.35
LOADED = (Trainer, LlamaForCausalLM)
"""transformers imports these when they are first asked for; here they belong to the interpreter."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--quantized", type=Path, help="a quantized folder with adapters to use instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["APIQ_WORK"] = str(folder / "work")
        quantized = chosen.quantized or alone(write_quantized, folder, chosen)
        text = folder / "text.txt"
        text.write_text(words(quantized, (chosen.steps + 1) * chosen.length))
        params = FinetuneParams(
            text=str(text), length=chosen.length, held_out=1 / (chosen.steps + 1), epochs=1, batch_size=1,
            accumulation=1, checkpoints=1, activation_checkpointing=True, dtype=chosen.dtype, device="cpu",
        )  # fmt: skip
        imports = alone(peak_resident)
        used, cost = alone(tuned, quantized, params, folder / "out")
        parts = alone(needed, quantized, chosen.length, chosen.dtype)
    protocol = {name: value for name, value in vars(chosen).items() if name not in ("out", "quantized")}
    facts = judged(used - imports, parts) | {"imports_mb": mb(imports), "cost": cost, "protocol": protocol}
    print(facts)
    write(f"finetuning-{chosen.dtype}", facts, torch.device("cpu"), chosen.out)


def judged(used: int, parts: dict[str, int]) -> dict[str, Any]:
    """The peak beside the parts, in 2^20 bytes, and how many times their sum it is."""
    return {
        "parts_mb": {name: mb(size) for name, size in parts.items()},
        "sum_mb": mb(sum(parts.values())),
        "peak_mb": mb(used),
        "peak_to_sum": round(used / sum(parts.values()), 3),
        "at_most": BOUND,
    }


def write_quantized(folder: Path, chosen: argparse.Namespace) -> Path:
    """A random Llama with a tokenizer, quantized with adapters."""
    model = write_random_llama(folder / "model", chosen.blocks, chosen.hidden, chosen.inner)
    size = int(LlamaForCausalLM.config_class.from_pretrained(model).vocab_size)
    names = ["<end>", *map(str, range(1, size))]
    known = Tokenizer(models.WordLevel({name: token for token, name in enumerate(names)}, unk_token="<end>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=known, eos_token="<end>").save_pretrained(model)
    settings: dict[str, Any] = {"recipe": "paper", "bits": chosen.bits, "rank": chosen.rank, "epochs": 1}
    window = torch.randint(size, (1, 8), generator=torch.Generator().manual_seed(0))
    quantize(model, window, QuantizeParams(**settings, device="cpu"), folder / "quantized")
    return folder / "quantized"


def words(quantized: Path, count: int) -> str:
    """Text of so many random tokens."""
    draw, size = random.Random(0), len(read_tokenizer(quantized))
    return " ".join(str(draw.randrange(1, size)) for _ in range(count))


def tuned(quantized: Path, params: FinetuneParams, out: Path) -> tuple[int, dict[str, Any]]:
    """Peak resident bytes of this process once it has finetuned, and what finetuning says."""
    torch.set_num_threads(1)
    result = finetune(quantized, params, out)
    kept = ("steps", "held_out_loss_first", "held_out_loss_best", "seconds", "cpu_seconds")
    return peak_resident(), {name: result[name] for name in kept}


def needed(quantized: Path, length: int, dtype: str) -> dict[str, int]:
    """Bytes of what the bound counts."""
    model = load(quantized, dtype=dtype, device="cpu", trainable=True).model
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    adapters = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    return {
        "packed": sum(stored(path) for path in quantized.glob("*.safetensors")),
        "adapters": 4 * adapters,
        "activations": activations(model, length),
        "dequantized": max(linear.dequantized().nbytes for linear in packed),
    }


def stored(path: Path) -> int:
    """Bytes of the tensors in a file."""
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)


def activations(model: nn.Module, length: int) -> int:
    """Bytes that autograd keeps for the backward pass of the last block, parameters left out, input included."""
    block = find_blocks(model.get_base_model()).modules[-1]  # pyright: ignore[reportCallIssue]
    owned = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in owned:
            kept[value.untyped_storage().data_ptr()] = value  # held here, so that no address is used twice
        return value

    calls: list[tuple[Any, Any]] = []
    catch = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with catch, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
    (hidden, *others), keywords = calls[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        block(hidden.requires_grad_(), *others, **keywords)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


if __name__ == "__main__":
    main()
