"""Where and in which precision to compute."""

from __future__ import annotations

import contextlib

import torch

from apiq.errors import ApiqError

SMALL_BLOCK = 2**22
"""Weights of a block up to which the number of its operations takes the time, not its products: `apiq.layers.joint`."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions that models are computed and stored in, by name."""


def pick_device(name: str | torch.device) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N, mps) stands for here.

    Raises:
        ApiqError: there is none of that name, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ApiqError(f"device is {name}; it should be auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ApiqError(
            f"device is {name}; PyTorch sees {torch.cuda.device_count()} CUDA devices here, use auto or cpu."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ApiqError("device is mps; PyTorch finds no Metal device here, use auto or cpu.")
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The arithmetic that `name` (auto, float32, bfloat16, float16) stands for on `device`.

    auto is bfloat16 on a GPU that multiplies it itself (NVIDIA's from Ampere on), else float32.

    Raises:
        ApiqError: there is none of that name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and _gpu_multiplies_bfloat16(device) else torch.float32
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise ApiqError(f"dtype is {name}; it should be auto, {', '.join(DTYPES)}.")
    return DTYPES[plain]


def solver_dtype(name: str, device: torch.device, weights: int) -> torch.dtype:
    """The same for the fitting of blocks of so many weights in linears.

    auto is bfloat16 also on a CPU that multiplies it itself, but for a small block, which is fitted faster in float32.
    """
    if name == "auto" and device.type == "cpu" and weights > SMALL_BLOCK and multiplies_bfloat16():
        return torch.bfloat16
    return pick_dtype(name, device)


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """The context in which to compute in `dtype` on `device`: autocast, but for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16: 5 times as fast as float32 then, emulated 50 times as slow."""
    capable = torch.cpu.get_capabilities()
    return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))


def _gpu_multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this GPU has products of bfloat16; older ones, such as T4 and V100, emulate them slowly."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
