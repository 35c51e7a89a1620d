"""The uniform affine grid with a learnable clipping range (ApiQ, equations 1 and 3, section 4.3).

Letters as in the paper: W (out, in) a weight, s (out, G) scales, z (out, G) zero points, g the
group size, G = ceil(in / g) groups a row, b bits, codes in 0 .. 2^b - 1, Q = s (codes - z).

On the ternary grid, of TERNARY = 1.58 bits, codes are in 0 .. 2 and z = 1: the levels are -s, 0 and s.

On the balanced grid, SEQ of ParetoQ (arXiv 2502.02631), z = (2^b - 1) / 2 lies halfway between two whole numbers: the
levels are +-s/2, +-3s/2, ..., as many on either side of 0, and 0 is none of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from apiq.grids import sweeps
from apiq.grids.levels import TERNARY, levels

SCALE_DTYPE = torch.float16
"""Scales are stored, and therefore trained, in this precision."""
SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16."""


@dataclass(frozen=True)
class Grid:
    """A choice of bits, group size and symmetry.

    Raises:
        ValueError: TERNARY bits without `symmetric`.
    """

    bits: float
    """Bits of a code, b: 1 to 8, or TERNARY for the levels -s, 0 and s."""
    group_size: int
    """Consecutive inputs that share a scale, g; 0 for one group a row. The last group may be shorter."""
    symmetric: bool | Literal["balanced"]
    """Fixed zero point instead of one per group: 2^(b-1), or (2^b - 1) / 2 where it is balanced. True if ternary."""
    offsets: bool = False
    """A float32 number o for each group besides, Q = s (codes - z) + o: what a pooled adapter was merged into."""

    def __post_init__(self) -> None:
        if self.bits == TERNARY and self.symmetric is not True:
            raise ValueError(f"a grid of {TERNARY} bits is symmetric, not {self.symmetric!r}")

    @property
    def top(self) -> int:
        """The largest code, 2^b - 1 or, ternary, 2."""
        return levels(self.bits) - 1

    @property
    def balanced(self) -> bool:
        """Whether the levels are odd multiples of s / 2."""
        return self.symmetric == "balanced"

    @property
    def zero(self) -> float:
        """The fixed zero point of a symmetric grid."""
        return self.top / 2 if self.balanced else float(levels(self.bits) // 2)

    @property
    def steps(self) -> int:
        """Steps s in a range: between its outer levels or, where 0 is their middle, between the ends of their cells."""
        return self.top + (self.zero == self.top / 2)

    def width(self, in_features: int) -> int:
        """The group size in use for a row of `in_features` weights."""
        return min(self.group_size, in_features) or in_features

    def groups(self, in_features: int) -> int:
        """Groups in a row, G."""
        return math.ceil(in_features / self.width(in_features))


def grouped(W: Tensor, grid: Grid) -> Tensor:
    """W (out, in) as (out, G, g); a short last group is filled up with its last value."""
    out, in_features = W.shape
    width = grid.width(in_features)
    short = -in_features % width
    if short:
        W = F.pad(W.unsqueeze(0), (0, short), mode="replicate").squeeze(0)
    return W.reshape(out, -1, width)


def ungrouped(V: Tensor, in_features: int) -> Tensor:
    """The inverse of `grouped`: (out, G, g) as (out, in)."""
    flat = V.reshape(V.shape[0], -1)
    return flat if flat.shape[1] == in_features else flat[:, :in_features].contiguous()


def extrema(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, each (out, G), stretched to hold 0.

    Zero points are clamped to 0 .. 2^b - 1, so that b bits hold them; a grid with such a zero point
    always holds 0, and a range that leaves 0 out would be clipped on its far side.
    """
    groups = grouped(W, grid)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def scale_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales s and zero points z of the range low .. high, each (out, G).

    Asymmetric (section 4.3): s = (high - low) / (2^b - 1), z = round(-low / s) within 0 .. 2^b - 1.
    Symmetric: s = 2 max(|low|, |high|) / (2^b - 1), z = 2^(b-1), the zero point that symmetric
    kernels assume. Balanced: s = 2 max(|low|, |high|) / 2^b, so that 2^b cells of one width fill the range, each with
    its level in the middle; ternary s = 2 max(|low|, |high|) / 3 for the same reason, and z = 1.
    s is rounded to float16 with a straight-through gradient; z carries none.
    """
    if grid.symmetric:
        s = _storable(2 * torch.maximum(high, -low) / grid.steps)
        return s, torch.full_like(s, grid.zero).detach()
    s = _storable((high - low) / grid.top)
    return s, (-low / s).detach().round().clamp(0, grid.top)


def clipped(gamma: Tensor, beta: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the range sigmoid(beta) low .. sigmoid(gamma) high (section 4.3), all of one shape."""
    return scale_and_zero(torch.sigmoid(beta) * low, torch.sigmoid(gamma) * high, grid)


def clipped_gradient(
    for_s: Tensor, gamma: Tensor, beta: Tensor, low: Tensor, high: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The gradients of gamma and beta from that of s = `clipped(...)[0]`, all of one shape.

    With a bound sigmoid(factor) extremum, ds/dfactor = ds/dbound bound (1 - sigmoid(factor)).
    """
    upper, lower = torch.sigmoid(gamma), torch.sigmoid(beta)
    top, bottom = upper * high, lower * low
    if grid.symmetric:
        for_reach = _within(2 * torch.maximum(top, -bottom) / grid.steps, for_s).mul_(2 / grid.steps)
        share = (top + bottom).sign_().add_(1).div_(2)  # the larger bound has it all, in a tie each half
        return for_reach * share * top * (1 - upper), for_reach * (share - 1) * bottom * (1 - lower)
    for_span = _within((top - bottom) / grid.top, for_s).div_(grid.top)
    return for_span * top * (1 - upper), for_span * bottom * (lower - 1)


def _within(s: Tensor, grad: Tensor) -> Tensor:
    """The gradient `grad` where s can be stored, 0 where it is clamped."""
    return grad * ((s >= SMALLEST_SCALE) & (s <= torch.finfo(SCALE_DTYPE).max))


def _storable(s: Tensor) -> Tensor:
    s = s.clamp(SMALLEST_SCALE, torch.finfo(SCALE_DTYPE).max)
    return s + (s.detach().to(SCALE_DTYPE).to(s.dtype) - s.detach())


def encode(W: Tensor, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
    """Codes clamp(round(W / s) + z, 0, 2^b - 1) as uint8 (out, in) (equation 1); see `sweeps.unclamped`."""
    ratio = grouped(W.detach(), grid) / s.detach().unsqueeze(-1)
    codes = sweeps.unclamped(ratio, z.unsqueeze(-1), grid.balanced, out=ratio).clamp_(0, grid.top)
    return ungrouped(codes.to(torch.uint8), W.shape[1])


def decode(codes: Tensor, s: Tensor, z: Tensor, grid: Grid, o: Tensor | None = None) -> Tensor:
    """Q = s (codes - z) + o, (out, in), in the dtype of s; o (out, G) is 0 if left out."""
    groups = grouped(codes, grid).to(s.dtype)
    groups = groups.sub_(z.to(s.dtype).unsqueeze(-1)).mul_(s.unsqueeze(-1))
    return ungrouped(groups if o is None else groups.add_(o.to(s.dtype).unsqueeze(-1)), codes.shape[1])


def fake_quantize(W: Tensor, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
    """Q = decode(encode(W)), (out, in), float32, with gradients for s and W through the rounding.

    Straight-through (Bengio et al., arXiv 1308.3432): dQ/ds = codes - z - W/s and dQ/dW = 1 inside the range;
    where the code is clamped dQ/ds = codes - z and dQ/dW = 0.
    """
    return _FakeQuantize.apply(W, s, z, grid)


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization that keeps nothing of the size of W for the backward pass but W itself."""

    @staticmethod
    def forward(ctx, W: Tensor, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(W, s, z)
        ctx.grid = grid
        return sweeps.dequantized(W, s, z, grid.top, grid.balanced, grid.width(W.shape[1]), torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        W, s, z = ctx.saved_tensors
        grid: Grid = ctx.grid
        rest = (W, s, z, grid.top, grid.balanced, grid.width(W.shape[1]))
        for_weight = sweeps.weight_gradient(grad, *rest) if ctx.needs_input_grad[0] else None
        return for_weight, sweeps.scale_gradient(grad, *rest), None, None
