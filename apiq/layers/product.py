"""The product with a fake-quantized weight as one step of autograd, which never holds more than one such weight.

    Y = X Q^T + bias,    Q = s (clamp(round(W / s) + z, 0, 2^b - 1) - z)

Lines 6 to 9 of Algorithm 1. The forward pass keeps X, s and z, but not Q; the backward pass makes Q again for the
gradient of X. The gradient G of Q is made in pieces of a few rows, and each is reduced at once to dL/ds, the sum over
each group of G dQ/ds; where W is trained, dL/dW is made of it too.
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


def product(
    X: Tensor, W: Tensor, s: Tensor, z: Tensor, grid: Grid, bias: Tensor | None = None,
    stored: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Y (..., out) for X (..., in), W (out, in), s and z (out, G), bias (out); in the precision of autocast, or of X.

    Q is rounded to the precision `stored`, that of W if left out, as it will be in the deployed linear. Differentiable
    once in X, W, s and the bias, straight-through in W and s; z carries no gradient.
    """
    kind = X.device.type
    dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else X.dtype
    return _Product.apply(X.to(dtype), s, bias, W, z, grid, stored or W.dtype)


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; some, such as meta, do not have it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def dequantized(
    W: Tensor, s: Tensor, z: Tensor, grid: Grid, dtype: torch.dtype, stored: torch.dtype | None = None
) -> Tensor:
    """Q (out, in) in `dtype`; it is rounded to `stored`, or the precision of W, first, as the deployed linear does."""
    first = stored or W.dtype
    first = dtype if first == torch.float32 else first
    return sweeps.dequantized(W, s, z, grid.top, grid.balanced, grid.width(W.shape[1]), first).to(dtype)


def rows_at_once(W: Tensor) -> Iterator[slice]:
    """Slices of the rows of W (out, in) that make pieces of the size of ROWS."""
    step = max((ROWS if W.device.type == "cpu" else ROWS_GPU) // W.shape[1], 1)
    for start in range(0, len(W), step):
        yield slice(start, min(start + step, len(W)))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, X: Tensor, s: Tensor, bias: Tensor | None, W: Tensor, z: Tensor, grid: Grid, stored: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(X, s, W, z)
        ctx.grid, ctx.stored = grid, stored
        return F.linear(X, dequantized(W, s, z, grid, X.dtype, stored), None if bias is None else bias.to(X.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        X, s, W, z = ctx.saved_tensors
        flat, inputs = grad.reshape(-1, grad.shape[-1]), X.reshape(-1, X.shape[-1])
        for_input = for_scale = for_bias = for_weight = None
        if ctx.needs_input_grad[0]:
            for_input = (flat @ dequantized(W, s, z, ctx.grid, X.dtype, ctx.stored)).view(X.shape)
        if ctx.needs_input_grad[3]:
            for_weight = torch.empty_like(W)
        if ctx.needs_input_grad[1] or for_weight is not None:
            for_scale = _scale_gradient(flat, inputs, W, s, z, ctx.grid, for_weight)
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0)
        return for_input, for_scale, for_bias, for_weight, None, None, None


def _scale_gradient(
    grad: Tensor, X: Tensor, W: Tensor, s: Tensor, z: Tensor, grid: Grid, for_weight: Tensor | None
) -> Tensor:
    """The gradient of s (out, G) from that of Y (tokens, out), for X (tokens, in); that of W into `for_weight`."""
    result = torch.empty_like(s)
    for rows in rows_at_once(W):
        G = grad[:, rows].t() @ X
        rest = (W[rows], s[rows], z[rows], grid.top, grid.balanced, grid.width(W.shape[1]))
        result[rows] = sweeps.scale_gradient(G, *rest)
        if for_weight is not None:
            for_weight[rows] = sweeps.weight_gradient(G, *rest).to(for_weight.dtype)
    return result
