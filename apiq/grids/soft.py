"""Soft rounding: a smooth staircase in the place of rounding, with its own gradient (arXiv 1908.05033, equations 4-8).

    r(u) = k + 1/2 + tanh((u - k - 1/2) / t) / (2 tanh(1 / (2 t))),    k = floor(u)

At a high temperature t it is u, at a low one it is rounding to nearest, and the gradient is its own. Only at t = 0,
where that is 0 almost everywhere, is the gradient straight-through. The stairs of the balanced grid rise at whole u:
there round(u) stands for k + 1/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apiq.grids import sweeps
from apiq.grids.affine import Grid, fake_quantize


def soft_quantize(W: Tensor, s: Tensor, z: Tensor, grid: Grid, temperature: float) -> Tensor:
    """Q = s (clamp(r(W / s) + z, 0, 2^b - 1) - z), (out, in), at least float32; straight-through at temperature 0.

    Shapes: W (out, in), s and z (out, G). Differentiable in W and s; where the code is clamped dQ/ds = code - z and
    dQ/dW = 0, elsewhere dQ/ds = r(u) - u r'(u) and dQ/dW = r'(u) with u = W / s.
    """
    if not temperature:
        return fake_quantize(W, s, z, grid)
    return _SoftQuantize.apply(W, s, z, grid, temperature)


def staircase(u: Tensor, temperature: float, balanced: bool = False) -> tuple[Tensor, Tensor]:
    """r(u) and r'(u), in the shape of u."""
    height = 2 * math.tanh(1 / (2 * temperature))
    middle = u.round() if balanced else u.floor() + 0.5
    slope = ((u - middle) / temperature).tanh()
    return middle + slope / height, (1 - slope.square()) / (temperature * height)


class _SoftQuantize(torch.autograd.Function):
    """Keeps nothing of the size of W for the backward pass but W itself."""

    @staticmethod
    def forward(ctx, W: Tensor, s: Tensor, z: Tensor, grid: Grid, temperature: float) -> Tensor:
        ctx.save_for_backward(W, s, z)
        ctx.grid, ctx.temperature = grid, temperature
        Q = torch.empty_like(W, dtype=torch.promote_types(W.dtype, torch.float32))
        for target, weight, scale, zero in sweeps.pieces(grid.width(W.shape[1]), (Q, W), (s, z)):
            steps, _ = staircase(weight / scale, temperature, grid.balanced)
            target.copy_((steps + zero).clamp_(0, grid.top).sub_(zero).mul_(scale))
        return Q

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        W, s, z = ctx.saved_tensors
        for_weight, for_scale = torch.empty_like(grad), torch.empty_like(s)
        pieces = sweeps.pieces(ctx.grid.width(W.shape[1]), (grad, W, for_weight), (for_scale, s, z))
        for upstream, weight, weight_target, scale_target, scale, zero in pieces:
            ratio = weight / scale
            steps, rise = staircase(ratio, ctx.temperature, ctx.grid.balanced)
            free = steps + zero
            codes = free.clamp(0, ctx.grid.top)
            rise *= free == codes
            weight_target.copy_(rise * upstream)
            scale_target.copy_(((codes - zero - ratio * rise) * upstream).sum(-1, keepdim=True))
        return for_weight if ctx.needs_input_grad[0] else None, for_scale, None, None, None
