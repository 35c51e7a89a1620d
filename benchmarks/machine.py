"""What every result is written with: the date, the machine and the versions; and how time and memory are measured."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from apiq.files import write_json

RESULTS = Path(__file__).parent / "results"
TURN = 0.3
"""Seconds of a turn of something that takes less."""


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, its threads, whether it multiplies bfloat16 itself, and the GPU where one is used."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": bool(torch.cpu.get_capabilities().get("avx512_bf16")),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        facts["cuda"] = torch.version.cuda
    return facts


def write(name: str, facts: dict[str, Any], device: torch.device, out: Path = RESULTS) -> Path:
    """Write `facts` to out/DATE-NAME.json with the machine and the versions."""
    date = datetime.date.today().isoformat()
    versions = {package: importlib.metadata.version(package) for package in ("apiq", "torch", "transformers", "peft")}
    path = out / f"{date}-{name}.json"
    write_json(path, {"date": date, "machine": machine(device), "versions": versions, **facts})
    print(f"written to {path}")
    return path


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What one call of `work` takes: CPU seconds of this process on a CPU, which others may share; else the clock."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def fastest(works: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """The least seconds of each of `works` over so many rounds of turns of TURN seconds, or one call."""
    counts = {name: max(1, round(TURN / max(_warm(work, device), 1e-6))) for name, work in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            gc.collect()
            taken[name].append(seconds(lambda work=work, name=name: _repeat(work, counts[name]), device) / counts[name])
    return {name: min(values) for name, values in taken.items()}


def _warm(work: Callable[[], object], device: torch.device) -> float:
    work()
    return seconds(work, device)


def _repeat(work: Callable[[], object], count: int) -> None:
    for _ in range(count):
        work()


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process, which inherits no memory from this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def mb(size: float) -> float:
    """Bytes in 2^20 bytes."""
    return round(size / 2**20, 1)


def extra_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch has allocated at the peak of one call of `work` above what it had before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
