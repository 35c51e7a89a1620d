"""A packed linear whose scales are trained while its codes and zero points stay.

    Y = X Q^T + bias,    Q = s L,    L = codes - z  (or the levels of NormalFloat),    s = stored scales times `factor`

The factors start at 1, so a learning rate is relative to the size of what it moves, whatever the model. The forward
pass keeps X and the factors; Q is made again in the backward pass, whole for the gradient of X and in pieces of
a few rows for dL/ds, the sum over each group of (dL/dQ) L. Offsets, where the grid has them, stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from apiq.grids.affine import SCALE_DTYPE, SMALLEST_SCALE, Grid, grouped
from apiq.layers.packed import PackedLinear
from apiq.layers.product import autocast_is_on, rows_at_once


class ScaledLinear(nn.Linear):
    """A PackedLinear with trainable `factor` (out, G) on its scales; `settled` gives it back with the new ones."""

    factor: nn.Parameter

    def __init__(self, packed: PackedLinear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.packed = packed
        self.factor = nn.Parameter(torch.ones_like(packed.scales, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Q (out, in) of the present scales, differentiable in the factors, for tuners that look at it."""
        return self.packed.scaled(self.scales()).to(self.packed.compute_dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the packed linear."""
        return self.packed.bias

    def scales(self) -> Tensor:
        """Scales s (out, G), float32, rounded as they are stored; straight-through in the factors."""
        s = (self.packed.scales.float() * self.factor).clamp(SMALLEST_SCALE, torch.finfo(SCALE_DTYPE).max)
        return s + (s.detach().to(SCALE_DTYPE).float() - s.detach())

    def forward(self, input: Tensor) -> Tensor:
        """X Q^T + bias, for X (..., in)."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else input.dtype
        return _ScaledProduct.apply(input.to(dtype), self.scales(), self.bias, self.packed)

    @torch.no_grad()
    def settled(self) -> PackedLinear:
        """The packed linear with the trained scales."""
        self.packed.scales = self.scales().to(SCALE_DTYPE)
        return self.packed


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X: Tensor, s: Tensor, bias: Tensor | None, packed: PackedLinear) -> Tensor:
        ctx.save_for_backward(X, s)
        ctx.packed = packed
        return F.linear(X, packed.scaled(s).to(X.dtype), None if bias is None else bias.to(X.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        X, s = ctx.saved_tensors
        flat, inputs = grad.reshape(-1, grad.shape[-1]), X.reshape(-1, X.shape[-1])
        for_input = for_scale = None
        if ctx.needs_input_grad[0]:
            for_input = (flat @ ctx.packed.scaled(s).to(grad.dtype)).view(X.shape)
        if ctx.needs_input_grad[1]:
            for_scale = _scale_gradient(flat, inputs, ctx.packed.levels(), ctx.packed.grid)
        return for_input, for_scale, None, None


def _scale_gradient(grad: Tensor, X: Tensor, L: Tensor, grid: Grid) -> Tensor:
    """The gradient of s (out, G) from that of Y (tokens, out), for X (tokens, in) and L (out, in)."""
    pieces = []
    for rows in rows_at_once(L):
        G = (grad[:, rows].t() @ X).float() * L[rows]
        short = -L.shape[1] % grid.width(L.shape[1])
        pieces.append(grouped(F.pad(G, (0, short)), grid).sum(-1))
    return torch.cat(pieces)
