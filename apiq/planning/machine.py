"""What this machine has free: memory, disk, processors."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from apiq.ram import free_ram


@dataclass(frozen=True)
class Machine:
    """Free bytes at this moment."""

    device: str
    """What is computed with, as in `cuda (NVIDIA A100)`."""
    threads: int
    """Threads that PyTorch uses on the CPU."""
    load: float
    """Processes that want a processor, mean of the last minute."""
    ram: int
    """RAM that can be had without swapping, within the limit of a container."""
    gpu: int | None
    """GPU memory; None on a CPU."""
    disk: dict[str, int]
    """Room on disk where results and unfinished work go, by folder."""
    one_disk: bool
    """Whether these folders share one disk, and so its room."""
    interpreter: int
    """Bytes that this process takes with its imports: what a run starts from."""


def look(device: torch.device, folders: dict[str, Path]) -> Machine:
    """Ask the system."""
    cuda = device.type == "cuda"
    first, *others = folders.values()
    name = f"{device} ({torch.cuda.get_device_name(device)})" if cuda else str(device)
    return Machine(
        device=name,
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        ram=free_ram(),
        gpu=torch.cuda.mem_get_info(device)[0] if cuda else None,
        disk={purpose: shutil.disk_usage(standing(folder)).free for purpose, folder in folders.items()},
        one_disk=all(same_disk(first, other) for other in others),
        interpreter=psutil.Process().memory_info().rss,
    )


def standing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders, which need not be there yet, will share their room."""
    return standing(one).stat().st_dev == standing(other).stat().st_dev
