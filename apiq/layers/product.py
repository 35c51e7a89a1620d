"""The product with a fake-quantized weight as one step of autograd, which never holds more than one such weight.

    Y = X Q^T + c (X A^T) B^T + bias,    Q = s (clamp(round(W / s) + z, 0, 2^b - 1) - z)

Lines 6 to 9 of Algorithm 1, A and B being there or not. The forward pass keeps X, s and z, but not Q. The
backward pass makes the gradient G of Q in pieces of a few rows, and reduces each at once to dL/ds, the sum over each
group of G dQ/ds; in the same sweep it makes Q again, for the gradient of X, and where W is trained dL/dW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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


class LowRank(NamedTuple):
    """A plain LoRA beside the weight."""

    A: Tensor
    """(r, in)"""
    B: Tensor
    """(out, r)"""
    c: float
    """The factor on B A, alpha / r."""


def product(
    X: Tensor, W: Tensor, s: Tensor, z: Tensor, grid: Grid, bias: Tensor | None = None,
    stored: torch.dtype | None = None, low_rank: LowRank | None = None, room: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Y (..., out) for X (..., in), W (out, in), s and z (out, G), bias (out); in the precision of autocast, or of X.

    Q is rounded to the precision `stored`, that of W if left out, as it will be in the deployed linear. Differentiable
    once in X, W, s, A, B and the bias, straight-through in W and s; z carries no gradient. In `room`, a vector of at
    least the elements of W, Q is made where it is of that precision; nothing of it is kept.
    """
    kind = X.device.type
    dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else X.dtype
    A, B, c = low_rank or (None, None, 1.0)
    room = room if room is not None and room.dtype == dtype else None
    Y = _Product.apply(X.to(dtype), s, bias, A, B, W, z, grid, stored or W.dtype, c, room)
    # A view, but not one made inside: PEFT adds to outputs in place, which autograd forbids to views from a Function.
    return Y.view(*X.shape[:-1], len(W))


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; some, such as meta, do not have it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def dequantized(
    W: Tensor, s: Tensor, z: Tensor, grid: Grid, dtype: torch.dtype, stored: torch.dtype | None = None,
    room: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Q (out, in) in `dtype`; it is rounded to `stored`, or the precision of W, first, as the deployed linear does."""
    Q = _empty(W, stored or W.dtype, dtype, room)
    return sweeps.dequantized(W, s, z, grid.top, grid.balanced, grid.width(W.shape[1]), Q.dtype, Q).to(dtype)


def rows_at_once(W: Tensor) -> Iterator[slice]:
    """Slices of the rows of W (out, in) that make pieces of the size of ROWS."""
    step = max((ROWS if W.device.type == "cpu" else ROWS_GPU) // W.shape[1], 1)
    for start in range(0, len(W), step):
        yield slice(start, min(start + step, len(W)))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, X: Tensor, s: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, W: Tensor, z: Tensor,
        grid: Grid, stored: torch.dtype, c: float, room: Tensor | None,
    ) -> Tensor:  # fmt: skip
        flat = X.reshape(-1, X.shape[-1])
        Q = dequantized(W, s, z, grid, X.dtype, stored, room)
        Y = F.linear(flat, Q, None if bias is None else bias.to(X.dtype))
        H = None
        if A is not None and B is not None:
            A, B = A.to(X.dtype), (c * B).to(X.dtype)
            H = flat @ A.t()
            Y.addmm_(H, B.t())
        ctx.save_for_backward(X, s, W, z, A, B, H)
        ctx.grid, ctx.stored, ctx.c, ctx.room = grid, stored, c, room
        return Y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        X, s, W, z, A, cB, H = ctx.saved_tensors
        needed = ctx.needs_input_grad
        flat, inputs = grad, X.reshape(-1, X.shape[-1])
        P = None if A is None else flat @ cB
        for_input = for_scale = for_bias = for_weight = for_A = for_B = Q = None
        if needed[5]:
            for_weight = torch.empty_like(W)
        if needed[1] or for_weight is not None:
            Q = _empty(W, ctx.stored, X.dtype, ctx.room) if needed[0] else None
            for_scale = _scale_gradient(flat, inputs, W, s, z, ctx.grid, Q, for_weight)
        if needed[0]:
            Q = dequantized(W, s, z, ctx.grid, X.dtype, ctx.stored, ctx.room) if Q is None else Q.to(X.dtype)
            for_input = flat @ Q
            if P is not None and A is not None:
                for_input.addmm_(P, A)
            for_input = for_input.view(X.shape)
        if needed[2]:
            for_bias = flat.sum(0)
        if P is not None and needed[3]:
            for_A = (P.t() @ inputs).float()
        if P is not None and needed[4]:
            for_B = (flat.t() @ H).float().mul_(ctx.c)
        return for_input, for_scale, for_bias, for_A, for_B, for_weight, None, None, None, None, None


def _scale_gradient(
    grad: Tensor, X: Tensor, W: Tensor, s: Tensor, z: Tensor, grid: Grid, Q: Tensor | None, for_weight: Tensor | None
) -> Tensor:
    """The gradient of s (out, G) from that of Y (tokens, out), for X (tokens, in).

    Q is written to `Q`, and the gradient of W to `for_weight`, where they are given.
    """
    result = torch.empty_like(s)
    for rows in rows_at_once(W):
        G = grad[:, rows].t() @ X
        rest = (W[rows], s[rows], z[rows], grid.top, grid.balanced, grid.width(W.shape[1]))
        if Q is None:
            result[rows] = sweeps.scale_gradient(G, *rest)
        else:
            result[rows] = sweeps.dequantized_and_scale_gradient(G, *rest, Q[rows])
        if for_weight is not None:
            for_weight[rows] = sweeps.weight_gradient(G, *rest).to(for_weight.dtype)
    return result


def _empty(W: Tensor, stored: torch.dtype, dtype: torch.dtype, room: Tensor | None) -> Tensor:
    """Room for Q in the precision in which it is rounded first."""
    first = dtype if stored == torch.float32 else stored
    if room is not None and room.dtype == first:
        return room[: W.numel()].view(W.shape)
    return torch.empty_like(W, dtype=first)
