"""When the elementwise work of a sweep is compiled to one pass over its tensors, and by what."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

MANY = 2**32
"""Weights times steps from which compiling for a CPU pays: it takes 7 to 20 s and saves 3 ns of each."""
_for_cpu = False
_seen: set[tuple] = set()


@contextlib.contextmanager
def many(weights: int) -> Iterator[None]:
    """Within it sweeps on a CPU are compiled, if so many `weights`, counted once a step, are worth the wait."""
    global _for_cpu
    before, _for_cpu = _for_cpu, _for_cpu or (weights >= MANY and _has_cpp_compiler())
    try:
        yield
    finally:
        _for_cpu = before


def pays(W: Tensor) -> bool:
    """Whether sweeps over W are to be compiled: within `many` on a CPU, and on a GPU that Triton knows."""
    if type(W) not in (Tensor, nn.Parameter):  # a subclass with which memory is counted, without data
        return False
    return _for_cpu if W.device.type == "cpu" else W.device.type == "cuda" and _has_triton(W.device)


def one_pass(function: Callable[..., None], *operands: Tensor, **settings: int | bool) -> None:
    """Call `function` compiled, on operands of any one number of rows.

    They go without their history as views, and without autocast: each of these would be compiled for anew.
    """
    rows = [operand.data for operand in operands]
    kind = function, *(operand.dtype for operand in rows)
    if kind not in _seen:
        _seen.add(kind)
        for operand in rows:
            torch._dynamo.maybe_mark_dynamic(operand, 0)
    with torch.autocast(rows[0].device.type, enabled=False):
        _compiled(function)(*rows, **settings)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function)


@functools.cache
def _has_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


@functools.cache
def _has_cpp_compiler() -> bool:
    """Whether a C++ compiler builds what torch.compile writes: one without Python's headers does not."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    try:
        with warnings.catch_warnings(), config.patch(force_disable_caches=True):
            warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
            torch.compile(_twice, dynamic=False)(torch.ones(16))
    except (BackendCompilerFailed, OSError):
        return False
    return True


def _twice(x: Tensor) -> Tensor:
    return x + x
