"""The precision in which the weights of a model are stored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}
"""Precision of weights by its name in the header of a safetensors file."""


def stored_dtype(files: Iterable[Path], config: PretrainedConfig) -> torch.dtype:
    """The precision of most weights in the safetensors `files`; what `config` declares where there are none."""
    found: Counter[torch.dtype] = Counter()
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                held = tensors.get_slice(key)
                if held.get_dtype() in FLOATS:
                    found[FLOATS[held.get_dtype()]] += math.prod(held.get_shape())
    return found.most_common(1)[0][0] if found else declared_dtype(config)


def declared_dtype(config: PretrainedConfig) -> torch.dtype:
    """The precision that `config`, or the part of it that is of the text, declares; else float32."""
    for each in (config, config.get_text_config()):
        declared = getattr(each, "dtype", None)
        if declared is not None:
            return getattr(torch, declared) if isinstance(declared, str) else declared
    return torch.float32
