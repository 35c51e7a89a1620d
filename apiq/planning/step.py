"""What one pass through a block takes: bytes alive at a time, and floating point operations.

The real code of the block runs on tensors without data (torch's FakeTensorMode), so that whatever the model, the
adapter and the fake quantization keep or make for a moment is counted and not guessed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from apiq.blocks.capture import BlockCall
from apiq.device import precision
from apiq.grids import sweeps
from apiq.refinement.divergence import top

PIECES = 16
"""Pieces in which the largest weight is swept at least: its temporaries are overestimated by as little."""


@dataclass(frozen=True)
class Pass:
    """What one batch takes beyond the weights and the input."""

    kept: int
    """Bytes alive between forward and backward."""
    peak: int
    """Most bytes alive at a time, gradients included."""
    flops_forward: int
    """Floating point operations of the forward; a multiplication and an addition are two."""
    flops: int
    """Those of forward and backward together."""


def count_pass(
    block: nn.Module,
    call: BlockCall,
    shape: tuple[int, int, int],
    weights: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
    around: Callable[[nn.Module], AbstractContextManager] = contextlib.nullcontext,
) -> Pass:
    """Count a forward and a backward of `block` (on the meta device) on hidden states of `shape`.

    Args:
        block: used up. Its trainable parameters get gradients and keep their precision.
        call: the arguments of the block besides the hidden states, real tensors.
        shape: batch, length, width.
        weights: precision of the frozen weights.
        compute: precision of the arithmetic, by autocast where it is not float32.
        device: where the block would run; decides which kernels are chosen.
        around: what a method wraps around its descent.
    """
    with _fake(block, call, shape, weights, compute, device) as (run, there):

        def backward(output: Tensor) -> None:
            nn.functional.mse_loss(output, torch.empty_like(output)).backward()

        peak, kept, flops = _counted(run, backward, there, around(block))
        with torch.no_grad():
            flops_forward = _counted(run, lambda output: None, there)[2]
    return Pass(kept=kept, peak=peak, flops_forward=flops_forward, flops=flops)


def count_forward(
    block: nn.Module, call: BlockCall, shape: tuple[int, int, int], weights: torch.dtype, compute: torch.dtype,
    device: torch.device,
) -> int:  # fmt: skip
    """Most bytes alive at a time in a forward of `block` (used up) that keeps nothing; arguments as `count_pass`."""
    with _fake(block, call, shape, weights, compute, device) as (run, there), torch.no_grad():
        return _counted(run, lambda output: None, there)[0]


@contextlib.contextmanager
def _fake(
    block: nn.Module, call: BlockCall, shape: tuple[int, int, int], weights: torch.dtype, compute: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[Callable[[], Tensor], list[Tensor]]]:  # fmt: skip
    """A forward of `block` on tensors without data, and the tensors that are there before it."""
    largest = max(value.numel() for value in [*block.parameters(), *block.buffers()])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, precision(device, compute), _coarser(largest // PIECES):
        for name, value in [*block.named_parameters(), *block.named_buffers()]:
            empty = torch.empty(value.shape, dtype=_dtype(value, weights), device=device)
            kept = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
            owner, _, own = name.rpartition(".")
            setattr(block.get_submodule(owner), own, kept)

        def fake(value: Tensor) -> Tensor:
            return mode.from_tensor(value).to(device)

        arguments: Any = tree_map_only(Tensor, fake, call.given(slice(0, shape[0]), shape[0], device))
        hidden = torch.empty(shape, dtype=compute, device=device, requires_grad=not _trains(block))

        def run() -> Tensor:
            return BlockCall(*arguments).run(block, hidden, slice(0, shape[0])).float()

        there = [hidden, *block.parameters(), *block.buffers()]
        there += [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]

        yield run, there


def count_head(rows: int, vocabulary: int, width: int, compute: torch.dtype, device: torch.device) -> int:
    """Most bytes alive at a time in logits and cross-entropy of `rows` tokens, forward and backward."""
    with FakeTensorMode(), precision(device, compute):
        weight = torch.empty(vocabulary, width, dtype=compute, device=device)
        hidden = torch.empty(rows, width, dtype=compute, device=device, requires_grad=True)
        labels = torch.empty(rows, dtype=torch.int64, device=device)

        def loss() -> Tensor:
            return nn.functional.cross_entropy((hidden @ weight.T).float(), labels)

        return _counted(loss, lambda value: value.backward(), [weight, hidden, labels])[0]


def count_predictions(
    rows: int, vocabulary: int, width: int, k: int, weights: torch.dtype, compute: torch.dtype, device: torch.device
) -> int:
    """Most bytes alive at a time while the `k` likeliest of so many tokens are taken from the logits of `rows`."""
    with FakeTensorMode(), precision(device, compute), torch.no_grad():
        head = torch.empty(vocabulary, width, dtype=weights, device=device)
        hidden = torch.empty(rows, width, dtype=compute, device=device)

        def ask() -> Tensor:
            return top(nn.functional.linear(hidden, head), k)[0]

        return _counted(ask, lambda found: None, [head, hidden])[0]


@contextlib.contextmanager
def _coarser(elements: int) -> Iterator[None]:
    """Let `apiq.grids.sweeps` take pieces of at least so many elements: without data each costs the same."""
    piece = sweeps.PIECE
    sweeps.PIECE = max(piece, elements)
    try:
        yield
    finally:
        sweeps.PIECE = piece


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make and subtracts them when they die."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out storages that were there before."""
        self._seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _counted(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], None],
    there: Iterable[Tensor],
    around: AbstractContextManager | None = None,
) -> tuple[int, int, int]:
    """Peak bytes, bytes between forward and backward, operations; `there` is not counted."""
    alive, flops = _Alive(), FlopCounterMode(display=False)
    alive.ignore(there)
    with flops, alive, around or contextlib.nullcontext():
        output = forward()
        kept = alive.now
        backward(output)
    return alive.peak, kept, flops.get_total_flops()


def _dtype(value: Tensor, weights: torch.dtype) -> torch.dtype:
    """Trained parameters and what is not of the weights' kind (codes, scales, group extrema) keep their precision."""
    plain = isinstance(value, nn.Parameter) and not value.requires_grad
    return weights if plain and value.is_floating_point() else value.dtype


def _trains(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())
