"""The product with a fake-quantized weight as one step of autograd, which never holds more than one such weight.

    Y = X Q^T + c (X A^T) B^T + bias,    Q = s (clamp(round(W / s) + z, 0, 2^b - 1) - z)

Lines 6 to 9 of Algorithm 1, A and B being there or not. The forward pass keeps X, s and z, but not Q; the backward pass
makes Q again for the gradient of X. The gradient G of Q is made in pieces of a few rows, and each is reduced at once to
dL/ds, the sum over each group of G dQ/ds; where W is trained, dL/dW is made of it too.
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
    least the elements of W, Q and G are made where it is of that precision; nothing of it is kept.
    """
    kind = X.device.type
    dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else X.dtype
    A, B, c = low_rank or (None, None, 1.0)
    room = room if room is not None and room.dtype == dtype else None
    return _Product.apply(X.to(dtype), s, bias, A, B, W, z, grid, stored or W.dtype, c, room)


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; some, such as meta, do not have it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def dequantized(
    W: Tensor, s: Tensor, z: Tensor, grid: Grid, dtype: torch.dtype, stored: torch.dtype | None = None,
    room: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Q (out, in) in `dtype`; it is rounded to `stored`, or the precision of W, first, as the deployed linear does."""
    first = stored or W.dtype
    first = dtype if first == torch.float32 else first
    out = _part(room, W.shape) if first == dtype else None
    return sweeps.dequantized(W, s, z, grid.top, grid.balanced, grid.width(W.shape[1]), first, out).to(dtype)


def rows_at_once(W: Tensor, least: int = 0) -> Iterator[slice]:
    """Slices of the rows of W (out, in) that make pieces of ROWS elements, or of `least` if that is more."""
    step = max(max(ROWS if W.device.type == "cpu" else ROWS_GPU, least) // W.shape[1], 1)
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
        return Y.view(*X.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        X, s, W, z, A, cB, H = ctx.saved_tensors
        needed = ctx.needs_input_grad
        flat, inputs = grad.reshape(-1, grad.shape[-1]), X.reshape(-1, X.shape[-1])
        P = None if A is None else flat @ cB
        for_input = for_scale = for_bias = for_weight = for_A = for_B = None
        if needed[0]:
            for_input = flat @ dequantized(W, s, z, ctx.grid, X.dtype, ctx.stored, ctx.room)
            if P is not None and A is not None:
                for_input.addmm_(P, A)
            for_input = for_input.view(X.shape)
        if needed[5]:
            for_weight = torch.empty_like(W)
        if needed[1] or for_weight is not None:
            for_scale = _scale_gradient(flat, inputs, W, s, z, ctx.grid, for_weight, ctx.room)
        if needed[2]:
            for_bias = flat.sum(0)
        if P is not None and needed[3]:
            for_A, for_B = (P.t() @ inputs).float(), (flat.t() @ H).float().mul_(ctx.c)
        return for_input, for_scale, for_bias, for_A, for_B, for_weight, None, None, None, None, None


def _scale_gradient(
    grad: Tensor, X: Tensor, W: Tensor, s: Tensor, z: Tensor, grid: Grid, for_weight: Tensor | None,
    room: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of s (out, G) from that of Y (tokens, out), for X (tokens, in); that of W into `for_weight`."""
    result = torch.empty_like(s)
    for rows in rows_at_once(W, 0 if room is None else room.numel()):
        G = torch.mm(grad[:, rows].t(), X, out=_part(room, W[rows].shape))
        rest = (W[rows], s[rows], z[rows], grid.top, grid.balanced, grid.width(W.shape[1]))
        result[rows] = sweeps.scale_gradient(G, *rest)
        if for_weight is not None:
            for_weight[rows] = sweeps.weight_gradient(G, *rest).to(for_weight.dtype)
    return result


def _part(room: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if room is None else room[: shape.numel()].view(shape)
