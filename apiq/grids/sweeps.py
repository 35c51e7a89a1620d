"""The elementwise work of the fake quantizer, piece by piece, so that its temporaries stay in the cache.

An expression like s (clamp(round(W / s) + z) - z) makes half a dozen passes over memory when it is written with whole
tensors. Here it is computed for a few rows at a time, and on a CPU a piece fits into the L2 cache of each core. Where
that pays torch.compile makes one pass of it: on a GPU with Triton, and within `many` on a CPU with a C++ compiler. Q
is the same either way, to the bit; the sums over groups are to rounding.

Shapes: W (out, in), s and z (out, G), g = `width` weights a group, the last group of a row may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from apiq.grids.compiled import one_pass, pays

PIECE = 2**16
"""Elements of a piece on one CPU core: 256 kB in float32, which an L2 cache holds."""
PIECE_GPU = 2**24
"""Elements of a piece elsewhere, where nothing is compiled: 64 MB in float32."""


def dequantized(
    W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, width: int, dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Q = s (clamp(round(W / s) + z, 0, top) - z), (out, in), computed in float32, in `dtype`; no gradients.

    It is written to `out` where that is given, of the shape of W and in `dtype`.
    """
    Q = torch.empty_like(W, dtype=dtype) if out is None else out
    _sweep(_dequantize, width, (Q, W), (s, z), top=top, balanced=balanced)
    return Q


def scale_gradient(grad: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, width: int) -> Tensor:
    """The gradient of s, (out, G) float32, from that of Q, (out, in): the sum over each group of grad dQ/ds."""
    result = torch.empty_like(s)
    _sweep(_differentiate_scale, width, (grad, W), (result, s, z), top=top, balanced=balanced)
    return result


def dequantized_and_scale_gradient(
    grad: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, width: int, out: Tensor
) -> Tensor:
    """Both in one sweep: Q in `out`, (out, in) in the precision of `out`, and the gradient of s, which is returned."""
    result = torch.empty_like(s)
    _sweep(_dequantize_and_differentiate, width, (grad, W, out), (result, s, z), top=top, balanced=balanced)
    return result


def weight_gradient(grad: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, width: int) -> Tensor:
    """The gradient of W, (out, in), from that of Q: `grad` where the code is not clamped, 0 where it is."""
    result = torch.empty_like(grad)
    _sweep(_differentiate_weight, width, (grad, W, result), (s, z), top=top, balanced=balanced)
    return result


def unclamped(ratio: Tensor, z: Tensor, balanced: bool, out: Tensor | None = None) -> Tensor:
    """The codes of W / s before they are clamped: those of the levels nearest to W.

    That is round(W / s) + z for whole z. The cells of the balanced grid begin and end at whole W / s, so there it is
    floor(W / s) + z + 1/2, in which nothing is rounded; in W / s + z a weight near 0 would lose its sign.
    """
    if balanced:
        return torch.floor(ratio, out=out).add_(z + 0.5)
    return torch.round(ratio, out=out).add_(z)


def pieces(width: int, weights: Sequence[Tensor], per_group: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same few rows of all tensors: (rows, groups, width) of `weights`, (rows, groups, 1) of `per_group`.

    The groups of a piece are of one width; a last group that is shorter comes in pieces of its own.
    """
    out, in_features = weights[0].shape
    full = in_features // width * width
    for start, stop in ((0, full), (full, in_features)):
        if start == stop:
            continue
        first, last = start // width, -(-stop // width)
        shape = (out, last - first, -1)
        views = [V[:, start:stop].view(shape) for V in weights] + [v[:, first:last, None] for v in per_group]
        step = max(_elements(weights[0]) // (stop - start), 1)
        yield from zip(*(view.split(step) for view in views), strict=True)


def _sweep(
    function: Callable[..., None], width: int, weights: Sequence[Tensor], per_group: Sequence[Tensor], **settings: int
) -> None:
    """Call `function` on all of the tensors, compiled or piece by piece; it writes into one of them."""
    rows = all(V.is_contiguous() for V in weights)  # those of GPT-2 are columns: its weights are transposed
    if pays(weights[0]) and rows and weights[0].shape[1] % width == 0:
        one_pass(function, *(V.view(-1, width) for V in weights), *(v.view(-1, 1) for v in per_group), **settings)
        return
    for piece in pieces(width, weights, per_group):
        function(*piece, **settings)


def _dequantize(Q: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool) -> None:
    ratio = torch.div(W, s, out=Q) if Q.dtype == torch.float32 else W / s
    values = unclamped(ratio, z, balanced, out=ratio).clamp_(0, top).sub_(z).mul_(s)
    if values.dtype != Q.dtype:
        Q.copy_(values)


def _differentiate_scale(
    grad: Tensor, W: Tensor, result: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool
) -> None:
    ratio = W / s
    free = unclamped(ratio, z, balanced)
    codes = free.clamp(0, top)
    inside = free.eq_(codes)  # 1 or 0: a comparison to bool is several times slower on a CPU
    result.copy_(codes.sub_(z).sub_(ratio.mul_(inside)).mul_(grad).sum(-1, keepdim=True))


def _dequantize_and_differentiate(
    grad: Tensor, W: Tensor, Q: Tensor, result: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool
) -> None:
    ratio = W / s
    free = unclamped(ratio, z, balanced)
    codes = free.clamp(0, top)
    inside = free.eq_(codes)
    levels = codes.sub_(z)
    Q.copy_(levels * s)
    result.copy_(levels.sub_(ratio.mul_(inside)).mul_(grad).sum(-1, keepdim=True))


def _differentiate_weight(
    grad: Tensor, W: Tensor, result: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool
) -> None:
    free = unclamped(W / s, z, balanced)
    result.copy_(free.eq_(free.clamp(0, top)).mul_(grad))


def _elements(W: Tensor) -> int:
    return PIECE * torch.get_num_threads() if W.device.type == "cpu" else PIECE_GPU
