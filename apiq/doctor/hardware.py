"""torch, its device and its precisions, the compiler, memory and disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants
from rich.filesize import decimal

from apiq.device import SMALL_BLOCK, pick_device, solver_dtype
from apiq.doctor.finding import Finding
from apiq.planning.machine import standing
from apiq.ram import free_ram, whole_ram

SIDE = 1024
"""Rows and columns of the matrices whose product is timed."""
LITTLE_RAM, LITTLE_DISK, NO_DISK = 4 * 10**9, 20 * 10**9, 10**9
"""Free bytes below which a warning is due, and free disk below which nothing can be written."""


def check(folder: Path) -> Iterator[Finding]:
    """Torch and what it computes with, the compiler of torch.compile, RAM, and disks."""
    device = pick_device("auto")
    yield build(
        torch.__version__, torch.version.cuda, torch.cuda.is_available(), shutil.which("nvidia-smi") is not None
    )
    if device.type == "cuda":
        yield _gpu(device)
    rates = matmul_rate(torch.float32, device), matmul_rate(torch.bfloat16, device)
    yield precisions(*rates, str(device), solver_dtype("auto", device, SMALL_BLOCK + 1))
    yield _compiler()
    yield _ram()
    work = Path(os.environ.get("APIQ_WORK") or folder / ".apiq_work")
    places = {"here": folder, "unfinished work": work, "hub cache": Path(constants.HF_HUB_CACHE)}
    for purpose, place in places.items():
        yield disk(purpose, standing(place), shutil.disk_usage(standing(place)).free)


def build(version: str, cuda: str | None, available: bool, driver: bool) -> Finding:
    """The build of torch against the GPU that is or is not there."""
    if available:
        return Finding("torch", "ok", f"{version} with CUDA {cuda}")
    if cuda is not None:
        return Finding(
            "torch", "warning", f"{version} is built for CUDA {cuda} and sees no GPU",
            f"install or update the NVIDIA driver for CUDA {cuda}; see nvidia-smi",
        )  # fmt: skip
    if driver:
        return Finding(
            "torch", "warning", f"{version} is built for the CPU on a machine with an NVIDIA driver",
            "install torch with CUDA from https://pytorch.org/get-started/locally",
        )  # fmt: skip
    return Finding("torch", "ok", f"{version} for the CPU, {torch.get_num_threads()} threads")


def precisions(single: float, half: float, device: str, auto: torch.dtype) -> Finding:
    """Rates of float32 and bfloat16 products in operations a second, against what quantize.dtype `auto` takes."""
    rates = f"float32 {single / 1e9:.3g} and bfloat16 {half / 1e9:.3g} GFLOP/s on {device}"
    if half > single and auto == torch.bfloat16:
        return Finding("bfloat16", "ok", f"native, {half / single:.1f} times as fast: {rates}")
    if half > single:
        found = f"{half / single:.1f} times as fast, though it does not count as native: {rates}; auto is float32"
        return Finding("bfloat16", "warning", found, "try quantize.dtype bfloat16")
    if auto == torch.bfloat16:
        return Finding(
            "bfloat16", "warning", f"slower here, but auto takes it: {rates}", "set quantize.dtype to float32"
        )
    return Finding("bfloat16", "warning", f"not native here: {rates}", "leave quantize.dtype at auto or float32")


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """Operations a second of square products in `dtype`, over about `seconds`."""
    W = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    _wait(W @ W)
    count, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        _wait(W @ W)
        count += 1
    return count * 2 * SIDE**3 / (time.monotonic() - start)


def disk(purpose: str, place: Path, free: int) -> Finding:
    """Room on the disk of a folder."""
    found = f"{decimal(free)} free at {place}"
    if free >= LITTLE_DISK:
        return Finding(f"disk ({purpose})", "ok", found)
    variable = {"unfinished work": "set APIQ_WORK to", "hub cache": "set HF_HOME to"}.get(purpose, "work in")
    status = "problem" if free < NO_DISK else "warning"
    return Finding(f"disk ({purpose})", status, found, f"{variable} a folder on a larger disk, or make room")


def _wait(result: torch.Tensor) -> None:
    if result.device.type != "cpu":
        torch.accelerator.synchronize()


def _gpu(device: torch.device) -> Finding:
    free, whole = torch.cuda.mem_get_info(device)
    found = f"{torch.cuda.get_device_name(device)}, {decimal(free)} of {decimal(whole)} free"
    if free < whole / 2:
        return Finding("gpu", "warning", found, "see nvidia-smi for what else runs there")
    return Finding("gpu", "ok", found)


def _compiler() -> Finding:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    path = next((path for path in map(shutil.which, names) if path), None)
    if path:
        return Finding("compiler", "ok", f"{path}, for torch.compile")
    return Finding(
        "compiler",
        "warning",
        f"none of {', '.join(names)} for torch.compile",
        "install g++; without, it runs uncompiled",
    )


def _ram() -> Finding:
    free = free_ram()
    found = f"{decimal(free)} of {decimal(whole_ram())} free"
    if free < LITTLE_RAM:
        return Finding("ram", "warning", found, "end other programs; `apiq plan` says what a run needs")
    return Finding("ram", "ok", found)
