"""The elementwise work of the fake quantizer, piece by piece, so that its temporaries stay in the cache.

An expression like s (clamp(round(W / s) + z) - z) makes half a dozen passes over memory when it is written with whole
tensors. Here it is computed for a few rows at a time: on a CPU a piece fits into the L2 cache of each core
and the passes cost next to nothing; on a GPU with Triton torch.compile makes one kernel of it. Both give
the same numbers.

Shapes: W (out, in), s and z (out, G), g = `width` weights a group, the last group of a row may be shorter.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

PIECE = 2**16
"""Elements of a piece on one CPU core: 256 kB in float32, which an L2 cache holds."""
PIECE_GPU = 2**24
"""Elements of a piece elsewhere, where nothing is compiled: 64 MB in float32."""


def dequantized(W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, width: int, dtype: torch.dtype) -> Tensor:
    """Q = s (clamp(round(W / s) + z, 0, top) - z), (out, in), computed in float32, in `dtype`; no gradients."""
    Q = torch.empty_like(W, dtype=dtype)
    compiled, in_place = _compiles(W), dtype == torch.float32
    for target, weight, scale, zero in pieces(width, (Q, W), (s, z)):
        if compiled:
            target.copy_(_compiled(_dequantized)(weight, scale, zero, top, balanced))
        elif in_place:
            _dequantized(weight, scale, zero, top, balanced, out=target)
        else:
            target.copy_(_dequantized(weight, scale, zero, top, balanced))
    return Q


def scale_gradient(grad: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, width: int) -> Tensor:
    """The gradient of s, (out, G) float32, from that of Q, (out, in): the sum over each group of grad dQ/ds."""
    result = torch.empty_like(s)
    compute = _compiled(_scale_gradient) if _compiles(W) else _scale_gradient
    for upstream, weight, target, scale, zero in pieces(width, (grad, W), (result, s, z)):
        target.copy_(compute(upstream, weight, scale, zero, top, balanced))
    return result


def weight_gradient(grad: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, width: int) -> Tensor:
    """The gradient of W, (out, in), from that of Q: `grad` where the code is not clamped, 0 where it is."""
    result = torch.empty_like(grad)
    compute = _compiled(_weight_gradient) if _compiles(W) else _weight_gradient
    for upstream, weight, target, scale, zero in pieces(width, (grad, W, result), (s, z)):
        target.copy_(compute(upstream, weight, scale, zero, top, balanced))
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


def _dequantized(W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool, out: Tensor | None = None) -> Tensor:
    ratio = torch.div(W, s, out=out)
    return unclamped(ratio, z, balanced, out=out).clamp_(0, top).sub_(z).mul_(s)


def _scale_gradient(grad: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool) -> Tensor:
    ratio = W / s
    free = unclamped(ratio, z, balanced)
    codes = free.clamp(0, top)
    inside = free.eq_(codes)  # 1 or 0: a comparison to bool is several times slower on a CPU
    return codes.sub_(z).sub_(ratio.mul_(inside)).mul_(grad).sum(-1, keepdim=True)


def _weight_gradient(grad: Tensor, W: Tensor, s: Tensor, z: Tensor, top: int, balanced: bool) -> Tensor:
    free = unclamped(W / s, z, balanced)
    return free.eq_(free.clamp(0, top)).mul_(grad)


def _elements(W: Tensor) -> int:
    if W.device.type == "cpu":
        return PIECE * torch.get_num_threads()
    return 2**62 if _compiles(W) else PIECE_GPU


def _compiles(W: Tensor) -> bool:
    """Whether compiling pays: on a GPU that Triton knows. On a CPU it takes longer than it saves."""
    return W.device.type == "cuda" and _is_real(W) and _has_triton(W.device)


def _is_real(W: Tensor) -> bool:
    return type(W) in (Tensor, nn.Parameter)  # and not a subclass with which memory is counted, without data


@functools.cache
def _has_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)
