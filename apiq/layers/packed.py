"""The linear of deployment: packed codes, float16 scales, packed zero points."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.errors import ApiqError
from apiq.grids import double_quantization, normal_float
from apiq.grids.affine import SCALE_DTYPE, Grid, decode
from apiq.grids.double_quantization import StoredScales
from apiq.grids.normal_float import NormalFloat
from apiq.grids.packing import pack, unpack, words
from apiq.layers import fused

SCALE_PARTS = ("scales", "scale_ranges", "scale_mean", "offsets")
"""Buffers that keep their precision whatever the model is cast to."""
_asked: ContextVar[dict[PackedLinear, Tensor] | None] = ContextVar("asked", default=None)
"""Within `asked_once`, the linear that was asked for its weight last, and the weight."""


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Within it the weight asked for last is kept: PEFT asks 20 times in a row to put one adapter on.

    It is one weight at a time, not those of the whole model. Codes and scales must stay as they are.
    """
    token = _asked.set({})
    try:
        yield
    finally:
        _asked.reset(token)


class PackedLinear(nn.Linear):
    """A frozen linear that dequantizes on the fly; subclasses nn.Linear so that PEFT's tuners act on it unchanged.

    Owns the buffers `codes` int32 (out, ceil(in b / 32)), or (out, ceil(in / 20)) if ternary, `scales` (out, G) and, on
    an asymmetric grid, `zeros` int32 (out, ceil(G b / 32)), and the parameter `bias` (out) where the layer has one.
    Doubly quantized scales are uint8 and come with `scale_ranges` float32 (blocks) and `scale_mean` float32 ().
    A grid with offsets has `offsets` float32 (out, G).
    `weight` is computed, never stored, and cannot be assigned to.
    """

    _is_hf_initialized = True  # or transformers computes the weight after loading, to fill the copy at random
    codes: Tensor
    scales: Tensor
    scale_ranges: Tensor
    scale_mean: Tensor
    zeros: Tensor
    offsets: Tensor

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.grid = grid
        groups = grid.groups(in_features)
        self.register_buffer("codes", torch.zeros(out_features, words(in_features, grid.bits), dtype=torch.int32))
        self.doubly_quantized = isinstance(grid, NormalFloat) and grid.double
        self.register_buffer(
            "scales", torch.zeros(out_features, groups, dtype=torch.uint8 if self.doubly_quantized else SCALE_DTYPE)
        )
        if self.doubly_quantized:
            blocks = double_quantization.blocks(out_features * groups)
            self.register_buffer("scale_ranges", torch.zeros(blocks, dtype=torch.float32))
            self.register_buffer("scale_mean", torch.zeros((), dtype=torch.float32))
        if not grid.symmetric:
            self.register_buffer("zeros", torch.zeros(out_features, words(groups, grid.bits), dtype=torch.int32))
        if grid.offsets:
            self.register_buffer("offsets", torch.zeros(out_features, groups, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.compute_dtype = dtype
        self.held: Tensor | None = None  # Q, while `apiq.layers.dense` holds it

    @classmethod
    def from_codes(
        cls, codes: Tensor, s: Tensor, z: Tensor | None, grid: Grid, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """Pack codes (out, in), scales and, on an asymmetric grid, zero points (out, G).

        Raises:
            ValueError: a code or zero point does not fit into the bits of the grid.
        """
        packed = cls(codes.shape[1], codes.shape[0], grid, bias is not None, dtype)
        packed.codes = pack(codes, grid.bits)
        if packed.doubly_quantized:
            packed.scales, packed.scale_ranges, packed.scale_mean = double_quantization.store(s)
        else:
            packed.scales = s.to(SCALE_DTYPE)
        if not grid.symmetric:
            assert z is not None
            packed.zeros = pack(z.to(torch.int64), grid.bits)
        if bias is not None:
            packed.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return packed

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) uint8, scales (out, G) float32, zero points (out, G) float32 (0 where the grid has none)."""
        stored = StoredScales(self.scales, self.scale_ranges, self.scale_mean) if self.doubly_quantized else None
        s = self.scales.float() if stored is None else double_quantization.restore(stored)
        if isinstance(self.grid, NormalFloat):
            z = torch.zeros_like(s)
        elif self.grid.symmetric:
            z = torch.full_like(s, self.grid.zero)
        else:
            z = unpack(self.zeros, self.grid.bits, s.shape[1]).to(s.dtype)
        return unpack(self.codes, self.grid.bits, self.in_features), s, z

    def dequantized(self) -> Tensor:
        """Q = s (codes - z) + offsets, or s levels[codes], (out, in), in float32, cast to the compute dtype."""
        return self._decoded(*self.unpacked(), self._offsets()).to(self.compute_dtype)

    def scaled(self, s: Tensor) -> Tensor:
        """Q (out, in) with other scales s (out, G) on its codes, in the dtype of s."""
        codes, _, z = self.unpacked()
        return self._decoded(codes, s, z, self._offsets())

    def levels(self) -> Tensor:
        """What the scales multiply: codes - z, or levels[codes], (out, in), float32."""
        codes, s, z = self.unpacked()
        return self._decoded(codes, torch.ones_like(s), z, None)

    def _offsets(self) -> Tensor | None:
        return self.offsets if self.grid.offsets else None

    def _decoded(self, codes: Tensor, s: Tensor, z: Tensor, o: Tensor | None) -> Tensor:
        if isinstance(self.grid, NormalFloat):
            return normal_float.decode(codes, s, self.grid)
        return decode(codes, s, z, self.grid, o)

    @property
    def weight(self) -> Tensor:
        """Q as a fresh tensor, but within `asked_once`; assigning to it or to its data is refused."""
        last = _asked.get()
        if last is None:
            return self.dequantized().as_subclass(_ReadOnlyWeight)
        if self not in last:
            last.clear()
            last[self] = self.dequantized().as_subclass(_ReadOnlyWeight)
        return last[self]

    @weight.setter
    def weight(self, value: object) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise ApiqError(_MERGE)

    def forward(self, input: Tensor) -> Tensor:
        """X Q^T + bias, for X (..., in)."""
        if self.held is not None:
            return F.linear(input, self.held.to(input.dtype), self.bias)
        if fused.fits(self, input):
            return fused.product(self, input)
        return _PackedProduct.apply(input, self.bias, self)

    def _apply(self, fn, recurse=True):
        """Follow `.to()` and the like, but keep the scales in the precision in which they were trained."""
        before = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name in SCALE_PARTS}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(self.codes.device))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=before["scales"].device)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and grid."""
        grid = self.grid
        kind = {False: "asymmetric", True: "symmetric", "balanced": "balanced"}[grid.symmetric]
        if isinstance(grid, NormalFloat):
            kind = "NormalFloat, scales in 8 bits" if grid.double else "NormalFloat"
        kind += ", offsets" if grid.offsets else ""
        return f"{self.in_features}, {self.out_features}, {grid.bits} bits, group size {grid.group_size}, {kind}"


class _PackedProduct(torch.autograd.Function):
    """X Q^T + bias that keeps neither Q nor X for the backward pass: Q is dequantized again."""

    @staticmethod
    def forward(ctx, X: Tensor, bias: Tensor | None, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(X, linear.dequantized().to(X.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        for_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ ctx.linear.dequantized().to(grad.dtype), for_bias, None


_MERGE = (
    "an adapter cannot be merged into packed codes: the sum does not lie on the low-bit grid and the merge "
    "would be lost; keep the adapter beside the quantized model, or dequantize the model first."
)


class _ReadOnlyWeight(torch.Tensor):
    """A dequantized weight that refuses `weight.data = ...` and `weight.data += ...`, with which PEFT merges."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ApiqError(_MERGE)
