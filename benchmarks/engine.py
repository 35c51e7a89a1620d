"""An optimizer step of ApiQ-bw on one Llama block, beside the plain transcription of Algorithm 1 and the floor.

    python -m benchmarks.engine                                      # CPU: width 1024, 512 tokens, fp32 and bf16
    python -m benchmarks.engine --device cuda --width 4096 8192 --tokens 2048 --dtypes bfloat16 float32
    python -m benchmarks.engine --width 128 --tokens 256 --group-size 32 --rank 16 --dtypes float32     # a small block

Four things take turns in one process, on the same block, windows and adapters; their fastest round counts:
- `engine`: a step as `apiq quantize` makes it for 20 passes over 128 windows, forward, backward and AdamW;
- `reference`: the same step of the transcription in benchmarks/reference.py;
- `floor`: forward and backward of the same block with plain trainable linears, no quantizer, adapter or optimizer;
- `forward`: forward of that block without gradients.
Peak memory is what PyTorch allocates above what was there before the step. In float32 the gradients of engine and
reference are compared. Writes benchmarks/results/DATE-engine-DEVICE-DTYPES.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from apiq.blocks.activations import Activations, Home
from apiq.blocks.capture import BlockCall
from apiq.blocks.problem import Problem
from apiq.grids.compiled import many
from apiq.layers.joint import jointly
from apiq.methods.fitting import Fit, Turn
from apiq.methods.flat import Group, Optimizer
from apiq.params import QuantizeParams
from benchmarks.machine import RESULTS, extra_memory, fastest, write
from benchmarks.reference import ReferenceLinear, reference_block

STEPS = 20 * 128
WHOLE = Turn(0, 1, grid=True, adapters=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, nargs="+", default=[1024])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    params = QuantizeParams(recipe="paper", bits=2, group_size=chosen.group_size, rank=chosen.rank)
    rows = []
    for width in chosen.width:
        for name in chosen.dtypes:
            problem = one_block(width, chosen.tokens, getattr(torch, name), device)
            rows.append(measure(problem, params, chosen.rounds))
            print(rows[-1], flush=True)
    protocol = {
        "bits": 2, "group_size": chosen.group_size, "rank": chosen.rank, "rounds": chosen.rounds, "inner": "2.75 width"
    }  # fmt: skip
    write("-".join(["engine", device.type, *chosen.dtypes]), {"protocol": protocol, "rows": rows}, device, chosen.out)


def measure(problem: Problem, params: QuantizeParams, rounds: int) -> dict[str, Any]:
    """One row: seconds and bytes of each, their ratios, and how far the gradients are apart."""
    assert problem.Xq is not None
    device, dtype, (_, tokens, width) = problem.Xq.device, problem.Xq.rows.dtype, problem.Xq.rows.shape
    plain = copy.deepcopy(problem.block)
    fit = Fit(problem, params)
    twin = reference_block(problem.block)
    steps = {
        "engine": fitting_step(problem, problem.block, fit.groups(WHOLE)),
        "reference": fitting_step(problem, twin, reference_groups(twin, params)),
        "floor": plain_step(problem, plain),
        "forward": forward_pass(problem, plain),
    }
    with jointly(problem.block), many(fit.weights * STEPS):
        time = fastest(steps, device, rounds)
        memory = {name: extra_memory(step, device) for name, step in steps.items()}
    row: dict[str, Any] = {
        "width": width,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: round(value, 5) for name, value in time.items()},
        "extra_mb": {name: round(value / 2**20, 1) for name, value in memory.items()},
        "engine_to_floor": round(time["engine"] / time["floor"], 3),
        "engine_to_reference": round(time["engine"] / time["reference"], 3),
        "memory_to_reference": round(memory["engine"] / memory["reference"], 3),
    }
    if dtype == torch.float32:
        row["gradient_difference"] = gradient_difference(problem, twin)
    return row


def one_block(width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A Llama block with random weights, on one window of random hidden states, in the precision of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, max_position_embeddings=tokens, attn_implementation="sdpa",
    )  # fmt: skip
    block = LlamaDecoderLayer(config, 0).requires_grad_(False)
    for parameter in block.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
    hidden = torch.randn(1, tokens, width, generator=generator)
    positions = torch.arange(tokens).unsqueeze(0)
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    call = BlockCall((), {"position_embeddings": tuple(part.to(device) for part in rotary)})
    home = Home("device", device)
    X = Activations(hidden.to(device, dtype), home)
    block.to(device, dtype)
    problem = Problem(1, block, call, X, X, None, None, 0, lambda: precision(device, dtype), lambda *_: None)
    problem.targets = X.mapped(problem.run)
    return problem


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """The context in which the block is computed."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def loss_of(problem: Problem, block: nn.Module) -> Tensor:
    """Both terms of the loss of ApiQ-bw."""
    assert problem.Xq is not None and problem.targets is not None
    batch = slice(0, 1)
    with problem.autocast():
        output = problem.call.run(block, problem.Xq[batch], batch).float()
    target = problem.targets[batch].float()
    return F.mse_loss(output, target) + F.mse_loss(output, 1.01 * target)


def fitting_step(problem: Problem, block: nn.Module, groups: list[Group]) -> Callable[[], None]:
    """Forward, backward and AdamW of a block with fake-quantized linears."""
    optimizer = Optimizer([group for group in groups if group.parameters])

    def step() -> None:
        optimizer.zero()
        loss_of(problem, block).backward()
        optimizer.step(1e-3)

    return step


def reference_groups(block: nn.Module, params: QuantizeParams) -> list[Group]:
    """The parameter groups of Table A.1 of the transcription."""
    layers = [module for module in block.modules() if isinstance(module, ReferenceLinear)]
    theta = [parameter for layer in layers for parameter in (layer.gamma, layer.beta)]
    adapters = [parameter for layer in layers for parameter in (layer.A, layer.B)]
    return [
        Group(theta, params.lr_theta, params.decay_theta),
        Group(adapters, params.lr_adapter, params.decay_adapter),
    ]


def plain_step(problem: Problem, block: nn.Module) -> Callable[[], None]:
    """Forward and backward with trainable linears, gradients dropped."""
    weights = [module.weight.requires_grad_(True) for module in block.modules() if isinstance(module, nn.Linear)]

    def step() -> None:
        loss_of(problem, block).backward()
        for weight in weights:
            weight.grad = None

    return step


def forward_pass(problem: Problem, block: nn.Module) -> Callable[[], None]:
    """Forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            loss_of(problem, block)

    return run


def gradient_difference(problem: Problem, twin: nn.Module) -> float:
    """Largest ||g - g'|| / ||g'|| over the parameters: g of the engine, g' of the transcription in the same state."""
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for name, layer in twin.named_modules():
        if isinstance(layer, ReferenceLinear):
            mine = problem.block.get_submodule(name)
            A, B = mine.lora_A["default"].weight, mine.lora_B["default"].weight
            pairs += [
                (mine.base_layer.gamma, layer.gamma),
                (mine.base_layer.beta, layer.beta),
                (A, layer.A),
                (B, layer.B),
            ]
    with torch.no_grad():
        for one, other in pairs:
            other.copy_(one)
    for parameter in (each for pair in pairs for each in pair):
        parameter.grad = None
    for block in (problem.block, twin):
        loss_of(problem, block).backward()
    return max(float((one.grad - other.grad).norm() / other.grad.norm()) for one, other in pairs)


if __name__ == "__main__":
    main()
