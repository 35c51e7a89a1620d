"""The product with a fake-quantized weight as one step of autograd, which never holds more than one such weight.

    Y = X Q^T + bias,    Q = s (clamp(round(W / s) + z, 0, 2^b - 1) - z)

Lines 6 to 9 of Algorithm 1. The forward pass keeps X, s and z, but not Q; the backward pass makes Q again for the
gradient of X. The gradient G of Q is made in pieces of a few rows, and each is reduced at once to dL/ds, the sum over
each group of G dQ/ds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from apiq.grids import sweeps
from apiq.grids.affine import Grid

ROWS = 2**20
"""Elements of a piece of G on a CPU: 4 MB in float32."""
ROWS_GPU = 2**25
"""Elements of a piece of G on a GPU: 64 MB in bfloat16."""


def product(X: Tensor, W: Tensor, s: Tensor, z: Tensor, grid: Grid, bias: Tensor | None = None) -> Tensor:
    """Y (..., out) for X (..., in), W (out, in), s and z (out, G), bias (out); in the precision of autocast, or of X.

    Differentiable once in X, s and the bias, straight-through in s; W and z carry no gradient.
    """
    kind = X.device.type
    dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else X.dtype
    return _Product.apply(X.to(dtype), s, bias, W, z, grid)


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; some, such as meta, do not have it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def dequantized(W: Tensor, s: Tensor, z: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Q (out, in) in `dtype`; it is rounded to the precision of W first, as the deployed linear does."""
    stored = W.dtype if W.dtype != torch.float32 else dtype
    return sweeps.dequantized(W, s, z, grid.top, grid.balanced, grid.width(W.shape[1]), stored).to(dtype)


def rows_at_once(W: Tensor) -> Iterator[slice]:
    """Slices of the rows of W (out, in) that make pieces of the size of ROWS."""
    step = max((ROWS if W.device.type == "cpu" else ROWS_GPU) // W.shape[1], 1)
    for start in range(0, len(W), step):
        yield slice(start, min(start + step, len(W)))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X: Tensor, s: Tensor, bias: Tensor | None, W: Tensor, z: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(X, s, W, z)
        ctx.grid = grid
        return F.linear(X, dequantized(W, s, z, grid, X.dtype), None if bias is None else bias.to(X.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        X, s, W, z = ctx.saved_tensors
        flat, inputs = grad.reshape(-1, grad.shape[-1]), X.reshape(-1, X.shape[-1])
        for_input = for_scale = for_bias = None
        if ctx.needs_input_grad[0]:
            for_input = (flat @ dequantized(W, s, z, ctx.grid, X.dtype)).view(X.shape)
        if ctx.needs_input_grad[1]:
            for_scale = _scale_gradient(flat, inputs, W, s, z, ctx.grid)
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0)
        return for_input, for_scale, for_bias, None, None, None


def _scale_gradient(grad: Tensor, X: Tensor, W: Tensor, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
    """The gradient of s (out, G) from that of Y (tokens, out), for X (tokens, in)."""
    result = torch.empty_like(s)
    width = grid.width(W.shape[1])
    for rows in rows_at_once(W):
        G = grad[:, rows].t() @ X
        result[rows] = sweeps.scale_gradient(G, W[rows], s[rows], z[rows], grid.top, grid.balanced, width)
    return result
