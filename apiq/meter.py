"""What a piece of work costs: seconds, CPU seconds and peak memory of this process."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path


class Meter:
    """Counts from its creation on; peak memory is that of the whole process."""

    def __init__(self) -> None:
        self._started, self._cpu = time.monotonic(), _cpu_seconds()

    def reading(self) -> dict[str, float]:
        """The cost so far.

        `seconds` on the clock, `cpu_seconds` of this process and its ended children, `peak_memory_mb` resident
        (2^20 bytes), and `peak_gpu_memory_mb` allocated by PyTorch where a GPU is in use.
        """
        cost = {
            "seconds": round(time.monotonic() - self._started, 3),
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 3),
            "peak_memory_mb": round(peak_resident() / 2**20, 1),
        }
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            peak = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
            cost["peak_gpu_memory_mb"] = round(peak / 2**20, 1)
        return cost


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_resident() -> int:
    """Most bytes that this process has had in memory.

    Linux counts into `ru_maxrss` what the parent had when it started the process, so its own mark is read instead.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 2**10
