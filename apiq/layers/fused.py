"""When a packed linear is computed by the Triton kernel of `apiq.layers.decode`, and the call of it.

Triton is imported on first use: it takes as long to import as torch, and the CPU never needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apiq.grids.affine import Grid
from apiq.layers.product import autocast_is_on

if TYPE_CHECKING:
    from apiq.layers.packed import PackedLinear

ROWS = 16
"""Rows of X up to which the kernel is used: it makes a sum of products for each, where a matrix product makes tiles."""
BITS = (2, 3, 4)
OLDEST = (8, 0)
"""Compute capability from which GPUs convert to bfloat16 (Ampere)."""


def fits(linear: PackedLinear, X: Tensor) -> bool:
    """Whether the kernel computes X Q^T + bias for this X (..., in); all else takes the plain path.

    X holds a few tokens on a GPU that Triton works on, in the precision of the linear; nothing asks for a gradient;
    levels are uniform, in 2, 3 or 4 bits, without offsets. torch.compile fuses the plain path itself, and autocast
    converts X there.
    """
    return (
        X.device.type == linear.codes.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and type(X) is Tensor
        and 0 < X.numel() <= ROWS * linear.in_features
        and _suits(linear, X)
        and works(X.device)
    )


def _suits(linear: PackedLinear, X: Tensor) -> bool:
    bias = linear.bias
    learns = torch.is_grad_enabled() and (X.requires_grad or (bias is not None and bias.requires_grad))
    same = X.dtype == linear.compute_dtype and (bias is None or bias.dtype == X.dtype)
    return (
        not learns
        and same
        and X.device == linear.codes.device
        and type(linear.grid) is Grid
        and linear.grid.bits in BITS
        and not linear.grid.offsets
        and not autocast_is_on(X.device.type)
    )


def product(linear: PackedLinear, X: Tensor) -> Tensor:
    """X Q^T + bias, (..., out), for X (..., in) that `fits`."""
    from apiq.layers.decode import decode

    zeros = None if linear.grid.symmetric else linear.zeros
    flat, width, bits = X.reshape(-1, linear.in_features), linear.grid.width(linear.in_features), int(linear.grid.bits)
    Y = decode(flat, linear.codes, linear.scales, zeros, linear.bias, bits, width, linear.grid.balanced)
    return Y.view(*X.shape[:-1], linear.out_features)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether Triton is installed and builds a kernel for this GPU. Where it is and does not, that is said, once."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    return builds(device)


def builds(device: torch.device) -> bool:
    """Whether the kernel can be built and started on the device: Triton needs a C compiler and Python's headers."""
    try:
        from apiq.layers.decode import decode

        X, scales = torch.ones(1, 16, device=device), torch.ones(1, 1, device=device, dtype=torch.float16)
        decode(X, torch.zeros(1, 1, dtype=torch.int32, device=device), scales, None, None, bits=2, width=16)
    except Exception as error:  # whatever Triton, the compiler or the driver raise: the plain path needs none of them
        warnings.warn(
            f"Triton's kernel for single tokens cannot be built ({type(error).__name__}: {error}); packed linears take "
            "the plain path, which is slower.",
            stacklevel=2,
        )
        return False
    return True
