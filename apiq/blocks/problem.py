"""What a method is given for one block, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.blocks.activations import Activations, mean_squared_error
from apiq.blocks.architecture import linears
from apiq.blocks.capture import BlockCall
from apiq.grids.affine import Grid
from apiq.layers.packed import PackedLinear


@dataclass
class Problem:
    """One block to be quantized. A method may change `block` as it likes; the walk rebuilds it from the solution."""

    index: int
    """Number of the block, from 0."""
    block: nn.Module
    """The full-precision block on the device."""
    call: BlockCall
    """Its arguments besides the hidden states."""
    X: Activations | None
    """Its input in the full-precision model; None when there are no calibration windows."""
    Xq: Activations | None
    """Its input in the quantized model, made by the quantized blocks before it."""
    targets: Activations | None
    """Its output in the full-precision model, F(W, X)."""
    counted: Tensor | None
    """Which positions (windows, length) count in a loss, bool on the device; None where nothing is padded."""
    seed: int
    """Seed for every random choice in this block."""
    autocast: Callable[[], AbstractContextManager]
    """The precision in which the block is to be computed."""
    report: Callable[[float, float, str], None]
    """Called with the share of the block that is done, the newest loss and a word on where the method is."""
    grids: dict[str, Grid] = field(default_factory=dict)
    """The grids of linears, by name inside the block, that have another one than the parameters say."""
    ranks: dict[str, int] = field(default_factory=dict)
    """The ranks of the adapters of all linears that carry one, where each has its own; otherwise empty."""

    def linears(self) -> dict[str, nn.Linear]:
        """The linears of the block by name."""
        return linears(self.block)

    def run(self, hidden: Tensor, batch: slice) -> Tensor:
        """The output of the block for `hidden` (batch, length, width), the windows of `batch`, in float32."""
        with self.autocast():
            return self.call.run(self.block, hidden, batch).float()

    def distance(self, output: Tensor, target: Tensor, batch: slice) -> Tensor:
        """Mean over the entries of all counted positions of (output - target)^2, for (batch, length, ...)."""
        if self.counted is None:
            return F.mse_loss(output, target.float())
        square = (output - target.float()).square()
        weight = self.counted[batch].unsqueeze(-1).to(square.dtype)
        return (square * weight).sum() / (weight.sum() * square.shape[-1]).clamp(min=1)

    def weight(self, batch: slice) -> float:
        """How much the mean over the windows of `batch` counts beside that over others: their counted positions."""
        if self.counted is not None:
            return float(self.counted[batch].sum())
        assert self.Xq is not None
        return (batch.stop - batch.start) * self.Xq.rows.shape[1]

    def loss_scale(self, entries: int) -> float | None:
        """What to multiply the mean over `entries` by before the backward pass: their number in float16, else None."""
        assert self.Xq is not None
        kind = self.Xq.device.type
        with self.autocast():
            low = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return float(entries) if low else None

    @torch.no_grad()
    def error(self, batch_size: int = 1) -> float:
        """Mean squared error of the block as it stands: F(Xq) against the targets."""
        assert self.Xq is not None and self.targets is not None
        inputs = self.Xq
        return mean_squared_error(lambda batch: self.run(inputs[batch], batch), self.targets, batch_size, self.counted)


@dataclass
class Curve:
    """Loss by epoch of one thing that was fitted: a block, or a linear of it."""

    name: str
    losses: list[float]


@dataclass
class Solution:
    """The quantized linears of a block and their adapters."""

    linears: dict[str, PackedLinear]
    """By name inside the block."""
    adapters: dict[str, Tensor] = field(default_factory=dict)
    """PEFT parameters by name inside the block, as in `self_attn.q_proj.lora_A.weight`."""
    curves: list[Curve] = field(default_factory=list)
    start: float | None = None
    """Mean squared error of the block before anything was fitted; None where nothing is."""
    unreached: list[str] = field(default_factory=list)
    """Linears that no calibration token reached, as in a mixture of experts; fitted to their weights alone."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """Other parameters that the method changed, by name inside the block: norms that took up a factor."""


class Method(Protocol):
    """A way to quantize a block."""

    calibrated: bool
    """Whether it needs X, Xq and targets."""
    adapted: bool
    """Whether its solutions carry adapters."""

    def solve(self, problem: Problem) -> Solution:
        """Quantize the linears of one block."""
        ...
