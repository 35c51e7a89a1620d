"""The weights of all linears of a small block, made together once a forward pass.

In a small block the time goes into the number of operations rather than into their size. `jointly` computes the scales,
zero points and Q of all its linears at once, and adds plain LoRA to its Q:

    Y = X (Q + c B A)^T + bias    instead of    Y = X Q^T + c (X A^T) B^T + bias,    c = alpha / r

It is the same function of the same parameters, and PEFT's modules keep them. With the gradient G of the
weight dL/dB = c G A^T, dL/dA = c B^T G, and dL/ds is the sum over each group of G dQ/ds. Where W is trained,
dL/dV = u G dQ/dW with the units u of its shift V.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from apiq.device import SMALL_BLOCK
from apiq.grids import sweeps
from apiq.grids.affine import Grid, clipped, clipped_gradient, grouped
from apiq.layers.beside import beside
from apiq.layers.fake_quant import FakeQuantLinear
from apiq.layers.lora import exchanged, low_rank, plain_lora
from apiq.layers.product import LowRank, autocast_is_on


@contextlib.contextmanager
def jointly(block: nn.Module) -> Iterator[None]:
    """Within it, the FakeQuantLinears of `block` share their work if they are small and computed in float32.

    Otherwise each computes its plain LoRA with its own product: see `apiq.layers.beside`.
    """
    fakes = [module for module in block.modules() if isinstance(module, FakeQuantLinear)]
    if not _is_small(fakes):
        with beside(block, fakes):
            yield
        return
    places = plain_lora(block)
    foldings = {id(child.get_base_layer()): _Folded(child) for _, _, child in places}
    sets = _sets([_Member(fake, foldings.get(id(fake))) for fake in fakes])

    def make(*_: object) -> None:
        for each in sets:
            each.make()

    def drop(*_: object) -> None:
        for each in sets:
            each.drop()

    hooks = [block.register_forward_pre_hook(make), block.register_forward_hook(drop, always_call=True)]
    try:
        with exchanged(places, lambda child: foldings[id(child.get_base_layer())]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_small(fakes: list[FakeQuantLinear]) -> bool:
    total = sum(fake.full_weight.numel() for fake in fakes)
    return 0 < total <= SMALL_BLOCK and all(fake.full_weight.dtype == torch.float32 for fake in fakes)


class _Folded(nn.Module):
    """Stands in for PEFT's LoRA layer and uses Q + c B A where that was made."""

    def __init__(self, layer: lora.Linear):
        super().__init__()
        self.layer = layer
        self.joint: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """X (Q + c B A)^T + bias, (..., out), for X (..., in)."""
        if self.joint is None:
            return self.layer(input)
        return F.linear(input, self.joint, self.layer.get_base_layer().bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Member:
    """A linear of the block, and the LoRA that is folded into it."""

    fake: FakeQuantLinear
    folded: _Folded | None

    @property
    def holder(self) -> FakeQuantLinear | _Folded:
        """The module that is to use the weight."""
        return self.folded or self.fake

    def adapter(self) -> LowRank | tuple[None, None, float]:
        """A (r, in), B (out, r) and the factor c; None and 1 without LoRA."""
        return (None, None, 1.0) if self.folded is None else low_rank(self.folded.layer)


def _sets(members: list[_Member]) -> list[_Set]:
    """The members by grid and group width, so that the groups of each set fit into one tensor."""
    by_kind: dict[tuple[Grid, int], list[_Member]] = {}
    for member in members:
        kind = member.fake.grid, member.fake.grid.width(member.fake.in_features)
        by_kind.setdefault(kind, []).append(member)
    return [_Set(grid, width, alike) for (grid, width), alike in by_kind.items()]


class _Set:
    """Linears whose groups are of one width g, stacked: W (groups of all, g), extrema (groups of all, 1)."""

    def __init__(self, grid: Grid, width: int, members: list[_Member]):
        self.grid, self.width, self.members = grid, width, members
        fakes = [member.fake for member in members]
        self.W = torch.cat([grouped(fake.full_weight, grid).flatten(0, 1) for fake in fakes])
        self.low = torch.cat([fake.low.flatten() for fake in fakes])
        self.high = torch.cat([fake.high.flatten() for fake in fakes])
        self.shapes = [(fake.out_features, fake.in_features) for fake in fakes]
        self.counts = [fake.low.numel() for fake in fakes]
        self.scaling = [member.adapter()[2] for member in members]
        trained = [fake.unit.flatten() for fake in fakes if fake.shift is not None]
        self.unit = torch.cat(trained)[:, None] if trained else None

    def make(self) -> None:
        """Compute the weights of all members and hand them out, unless autocast is on."""
        if autocast_is_on(self.W.device.type):
            return
        gammas = [member.fake.gamma for member in self.members]
        betas = [member.fake.beta for member in self.members]
        shifts = [member.fake.shift for member in self.members]
        adapters = [tensor for member in self.members for tensor in member.adapter()[:2]]
        weights = _JointWeights.apply(self, *gammas, *betas, *shifts, *adapters)
        for member, weight in zip(self.members, weights, strict=True):
            member.holder.joint = weight

    def drop(self) -> None:
        """Forget the weights."""
        for member in self.members:
            member.holder.joint = None

    def split(self, groups: Tensor) -> list[Tensor]:
        """(groups of all, g) as the (out, in) of each member, views."""
        parts = groups.split(self.counts)
        return [part.view(out, -1)[:, :columns] for part, (out, columns) in zip(parts, self.shapes, strict=True)]

    def shifted(self, shifts: Sequence[Tensor | None]) -> Tensor:
        """What is quantized, (groups of all, g): W, or W + u V where it is trained."""
        return self.W if self.unit is None else self.W + self.stack(shifts) * self.unit

    def stack(self, weights: Sequence[Tensor | None]) -> Tensor:
        """The inverse of `split`, with zeros where a last group is short."""
        short = [-columns % self.width for _, columns in self.shapes]
        pairs = [(V, missing) for V, missing in zip(weights, short, strict=True) if V is not None]
        padded = [F.pad(V, (0, missing)) if missing else V for V, missing in pairs]
        return torch.cat([V.reshape(-1, self.width) for V in padded])


class _JointWeights(torch.autograd.Function):
    """The weights (out, in) of all members of a set; differentiable in their gamma, beta, V, A and B."""

    @staticmethod
    def forward(ctx, joint: _Set, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        ctx.joint = joint
        count = len(joint.members)
        gamma, beta = (torch.cat([p.flatten() for p in part]) for part in _halves(parameters[: 2 * count]))  # type: ignore[union-attr]
        shifts, adapters = parameters[2 * count : 3 * count], parameters[3 * count :]
        s, z = clipped(gamma, beta, joint.low, joint.high, joint.grid)
        W = joint.shifted(shifts)
        ctx.save_for_backward(W, gamma, beta, s, z, *adapters)
        top, balanced = joint.grid.top, joint.grid.balanced
        Q = sweeps.dequantized(W, s[:, None], z[:, None], top, balanced, joint.width, torch.float32)
        weights = joint.split(Q)
        for weight, A, B, c in zip(weights, adapters[::2], adapters[1::2], joint.scaling, strict=True):
            if A is not None and B is not None:
                weight.addmm_(B, A, alpha=c)
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        joint: _Set = ctx.joint
        W, gamma, beta, s, z, *adapters = ctx.saved_tensors
        G = joint.stack(grads)
        rest = (W, s[:, None], z[:, None], joint.grid.top, joint.grid.balanced, joint.width)
        for_s = sweeps.scale_gradient(G, *rest)
        for_shifts: list[Tensor | None] = [None] * len(joint.members)
        if joint.unit is not None:
            for_shifts = [*joint.split(sweeps.weight_gradient(G, *rest).mul_(joint.unit))]
        both = clipped_gradient(for_s.flatten(), gamma, beta, joint.low, joint.high, joint.grid)
        for_ranges = [
            part.view(out, -1)
            for each in both
            for part, (out, _) in zip(each.split(joint.counts), joint.shapes, strict=True)
        ]
        for_adapters: list[Tensor | None] = []
        for grad, A, B, c in zip(grads, adapters[::2], adapters[1::2], joint.scaling, strict=True):
            for_adapters += (None, None) if A is None else ((B.t() @ grad).mul_(c), (grad @ A.t()).mul_(c))
        return None, *for_ranges, *for_shifts, *for_adapters


def _halves(values: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    return values[: len(values) // 2], values[len(values) // 2 :]
