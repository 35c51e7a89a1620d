"""The linear of deployment: packed codes, float16 scales, packed zero points."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.errors import ApiqError
from apiq.grids.affine import SCALE_DTYPE, Grid, decode
from apiq.grids.packing import pack, unpack, words


class PackedLinear(nn.Linear):
    """A frozen linear that dequantizes on the fly; subclasses nn.Linear so that PEFT's tuners act on it unchanged.

    Owns the buffers `codes` int32 (out, ceil(in b / 32)), `scales` (out, G) and, on an asymmetric
    grid, `zeros` int32 (out, ceil(G b / 32)), and the parameter `bias` (out) where the layer has one.
    `weight` is computed, never stored, and cannot be assigned to.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.grid = grid
        groups = grid.groups(in_features)
        self.register_buffer("codes", torch.zeros(out_features, words(in_features, grid.bits), dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=SCALE_DTYPE))
        if not grid.symmetric:
            self.register_buffer("zeros", torch.zeros(out_features, words(groups, grid.bits), dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.compute_dtype = dtype

    @classmethod
    def from_codes(
        cls, codes: Tensor, s: Tensor, z: Tensor, grid: Grid, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """Pack codes (out, in), scales and zero points (out, G).

        Raises:
            ValueError: a code or zero point does not fit into the bits of the grid.
        """
        packed = cls(codes.shape[1], codes.shape[0], grid, bias is not None, dtype)
        packed.codes = pack(codes, grid.bits)
        packed.scales = s.to(SCALE_DTYPE)
        if not grid.symmetric:
            packed.zeros = pack(z.to(torch.int64), grid.bits)
        if bias is not None:
            packed.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return packed

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) uint8, scales (out, G) float32, zero points (out, G) float32."""
        s = self.scales.float()
        if self.grid.symmetric:
            z = torch.full_like(s, 2.0 ** (self.grid.bits - 1))
        else:
            z = unpack(self.zeros, self.grid.bits, s.shape[1]).to(s.dtype)
        return unpack(self.codes, self.grid.bits, self.in_features), s, z

    def dequantized(self) -> Tensor:
        """Q = s (codes - z), (out, in), computed in float32, in the compute dtype."""
        codes, s, z = self.unpacked()
        return decode(codes, s, z, self.grid).to(self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """Q as a fresh tensor; assigning to it or to its data is refused."""
        return self.dequantized().as_subclass(_ReadOnlyWeight)

    @weight.setter
    def weight(self, value: object) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise ApiqError(_MERGE)

    def forward(self, input: Tensor) -> Tensor:
        """X Q^T + bias, for X (..., in)."""
        return _PackedProduct.apply(input, self.bias, self)

    def _apply(self, fn, recurse=True):
        """Follow `.to()` and the like, but keep the scales in the precision in which they were trained."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.codes.device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=scales.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and grid."""
        grid = self.grid
        kind = "symmetric" if grid.symmetric else "asymmetric"
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
