"""LoRA through PEFT in one block, and the names that it carries in the whole model.

PEFT writes the paper's A^T as `lora_A.weight` (r, in) and B as `lora_B.weight` (out, r); the linear
computes X Q^T + (alpha / r) X A B^T.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

_PARAMETER = re.compile(r"(?<![^.])(lora_\w+)\.default(?=\.|$)")


def lora_config(rank: int, alpha: float, target: list[str] | str) -> LoraConfig:
    """A LoRA of rank r scaled by alpha / r, without dropout, on the named linears."""
    scale: Any = int(alpha) if float(alpha).is_integer() else alpha  # PEFT declares an int and takes both
    return LoraConfig(r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=target)


def inject(block: nn.Module, names: Iterable[str], rank: int, alpha: float, seed: int) -> None:
    """Put LoRA with PEFT's start (A uniform, B = 0) on the named linears of a block; its parameters are float32."""
    devices = sorted({p.device.index for p in block.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(rank, alpha, list(names)), block)
    del block.peft_config
    for parameter in parameters(block).values():
        parameter.data = parameter.data.float()


def parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter parameters inside a block or a linear under their checkpoint names, without the adapter's name."""
    named = block.named_parameters()
    return {_PARAMETER.sub(r"\1", name): value for name, value in named if _PARAMETER.search(name)}


def load(block: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the adapter parameters of a block.

    Raises:
        KeyError: `state` and the block do not carry the same adapter parameters.
    """
    own = parameters(block)
    if own.keys() != state.keys():
        raise KeyError(f"adapter parameters differ: {sorted(own.keys() ^ state.keys())}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def model_target(path: str, names: Iterable[str]) -> str:
    """A regular expression for the linears `names` in every block of the list `path`."""
    alternatives = "|".join(re.escape(name) for name in names)
    return rf"{re.escape(path)}\.\d+\.({alternatives})"


def model_key(path: str, index: int, name: str) -> str:
    """The name under which PEFT saves the parameter `name` of block `index`."""
    return f"base_model.model.{path}.{index}.{name}"
