"""Several processes at one model: each holds a part of every batch, gradients and losses are added up.

Started by `torchrun --nproc-per-node N` or `accelerate launch --num_processes N`, which set the environment
that `join` reads. Until then, and with one process, nothing in this file does anything.
"""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor

from apiq.errors import ApiqError


def join(device: torch.device) -> torch.device:
    """Join the processes that this one was started with, by NCCL between GPUs and gloo between CPUs; its device.

    Raises:
        ApiqError: accelerate was told to divide the model itself.
    """
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ApiqError(
                f"accelerate is set to {kind}, which divides a model; packed weights stay whole in every process: "
                "launch with --multi_gpu, or choose plain multi-GPU in `accelerate config`."
            )
    if launched() == 1 or "MASTER_ADDR" not in os.environ:
        return device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def launched() -> int:
    """How many processes were started together with this one, itself among them, whether they have joined or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0; number 0 writes what all of them share."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add(value: Tensor) -> Tensor:
    """The sum over all processes, in the place of `value`."""
    if size() > 1:
        dist.all_reduce(value)
    return value


def sums(numbers: list[float], device: torch.device) -> list[float]:
    """The sum of each number over all processes; `device` is that of this one."""
    return numbers if size() == 1 else add(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def wait() -> None:
    """Go on once every process is here."""
    if size() > 1:
        dist.barrier()


def share(windows: Tensor, batch_size: int) -> tuple[Tensor, int]:
    """The windows of this process and how many of them are in a batch: an equal part of every batch.

    Raises:
        ApiqError: the windows or the batches cannot be divided evenly.
    """
    if size() == 1:
        return windows, batch_size
    if batch_size % size():
        raise ApiqError(
            f"quantize.batch_size is {batch_size}; it must be a multiple of {size()}, the number of processes."
        )
    if len(windows) % batch_size:
        raise ApiqError(
            f"calibration.windows is {len(windows)}; with several processes it must be a multiple of "
            f"quantize.batch_size, which is {batch_size}."
        )
    part = batch_size // size()
    rows = windows.view(-1, size(), part, windows.shape[1])[:, rank()]
    return rows.reshape(-1, windows.shape[1]), part
