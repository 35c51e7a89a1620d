"""The linear of calibration: a full-precision weight seen through a learnable grid."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.grids.affine import Grid, clipped, encode, extrema, grouped, ungrouped
from apiq.grids.search import best_shares
from apiq.grids.soft import soft_quantize
from apiq.layers.packed import PackedLinear
from apiq.layers.product import LowRank, product

START = 4.0
"""gamma and beta at the start: sigmoid(4) = 0.982, nearly no clipping (section 4.3)."""


@contextlib.contextmanager
def computed_once(linears: Collection[FakeQuantLinear]) -> Iterator[None]:
    """Within it the weight of each is what it was at the start: PEFT asks for it 20 times to put one adapter on."""
    for linear in linears:
        linear.joint = linear.weight.detach()
    try:
        yield
    finally:
        for linear in linears:
            linear.joint = None


class FakeQuantLinear(nn.Linear):
    """A linear whose `weight` is Q(W; gamma, beta), so that PEFT's tuners act on it unchanged.

    Owns the frozen `full_weight` W (out, in), shared with the linear it was made from, the group
    extrema `low` and `high` (out, G), computed once, and the clipping parameters `gamma` and `beta`
    (out, G): the range of a group is sigmoid(beta) low .. sigmoid(gamma) high. After `train_weight` also the
    `shift` V (out, in) of W in units u (out, G): what is quantized is W + u V.
    """

    full_weight: Tensor
    low: Tensor
    high: Tensor
    unit: Tensor
    shift: nn.Parameter | None

    def __init__(self, linear: nn.Linear, grid: Grid):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.grid = grid
        self.register_buffer("full_weight", linear.weight.detach(), persistent=False)
        low, high = extrema(linear.weight.detach().float(), grid)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.gamma = nn.Parameter(torch.full_like(high, START))
        self.beta = nn.Parameter(torch.full_like(low, START))
        self.register_parameter("shift", None)
        self.bias = linear.bias
        self.temperature = 0.0  # of soft rounding, while it is annealed
        self.joint: Tensor | None = None  # Q, while `apiq.layers.joint` or `computed_once` holds it
        self.room: Tensor | None = None  # where Q is made, while `apiq.layers.beside` lends it

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the present clipping range, each (out, G), float32."""
        return clipped(self.gamma, self.beta, self.low, self.high, self.grid)

    @torch.no_grad()
    def train_weight(self) -> None:
        """Let W move, from where it is and in units of the present scales, as in Block-AP (arXiv 2407.11062)."""
        self.register_buffer("unit", self.scale_and_zero()[0].clone(), persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(self.full_weight, dtype=torch.float32))

    @property
    def shifted(self) -> Tensor:
        """What is quantized, (out, in): W, or W + u V in float32 where it is trained; differentiable in V."""
        if self.shift is None:
            return self.full_weight
        moved = grouped(self.shift, self.grid) * self.unit.unsqueeze(-1)
        return self.full_weight + ungrouped(moved, self.in_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Q (out, in), differentiable in gamma, beta and V, in the dtype of W."""
        if self.joint is not None:
            return self.joint
        s, z = self.scale_and_zero()
        return soft_quantize(self.shifted, s, z, self.grid, self.temperature).to(self.full_weight.dtype)

    def forward(self, input: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """X Q^T + bias, (..., out), for X (..., in); with `low_rank` c (X A^T) B^T on top of it."""
        if self.joint is not None or self.temperature:
            assert low_rank is None, "neither is computed with LoRA beside it"
            return F.linear(input, self.weight, self.bias)
        s, z = self.scale_and_zero()
        stored = self.full_weight.dtype
        return product(input, self.shifted, s, z, self.grid, self.bias, stored, low_rank, self.room)

    @torch.no_grad()
    def fit_range(self, G: Tensor | None = None) -> None:
        """Set gamma and beta to the searched range of each group: see `apiq.grids.search.best_shares`.

        With the second moments G (in, in) of the input the error of the output counts, without them that of the weight.
        """
        whole = torch.sigmoid(torch.tensor(START)).item()
        lower, upper = best_shares(self.full_weight.float(), self.grid, G)
        self.gamma.copy_(upper.clamp(max=whole).logit())
        self.beta.copy_(lower.clamp(max=whole).logit())

    @torch.no_grad()
    def packed(self) -> PackedLinear:
        """The deployed linear with exactly the present codes, scales and zero points."""
        s, z = self.scale_and_zero()
        codes = encode(self.shifted.float(), s, z, self.grid)
        return PackedLinear.from_codes(codes, s, z, self.grid, self.bias, self.full_weight.dtype)
