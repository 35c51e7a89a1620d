"""Algorithm 1 of the ApiQ paper written down line by line for autograd: what the engine is measured against.

Nothing is fused, cached or recomputed: extrema, scales and zero points are made from W in every step (section 4.3), the
rounding is the detach trick of line 7, and LoRA is two products of its own. Scales are rounded to float16 and
zero points kept within the codes as in `apiq.grids.affine`, so that both compute the same function.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.blocks.architecture import replace
from apiq.layers.fake_quant import START, FakeQuantLinear


class ReferenceLinear(nn.Module):
    """Lines 6 to 9 for one linear: y^q = x^q (Q + c A B^T) + bias."""

    def __init__(self, fake: FakeQuantLinear, A: Tensor, B: Tensor, scaling: float):
        """W, grid and bias of `fake`; A (r, in) and B (out, r) as PEFT keeps them; c = alpha / r."""
        super().__init__()
        self.in_features, self.grid, self.scaling = fake.in_features, fake.grid, scaling
        self.W = nn.Parameter(fake.full_weight.clone(), requires_grad=False)
        self.bias = fake.bias
        self.gamma = nn.Parameter(torch.full_like(fake.high, START))
        self.beta = nn.Parameter(torch.full_like(fake.low, START))
        self.A = nn.Parameter(A.detach().clone())
        self.B = nn.Parameter(B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """y^q (..., out) for x^q (..., in)."""
        return F.linear(x, self.quantized(), self.bias) + F.linear(F.linear(x, self.A), self.B) * self.scaling

    def quantized(self) -> Tensor:
        """Q (out, in), differentiable in gamma and beta through the straight-through estimator."""
        width, top = self.grid.width(self.in_features), self.grid.top
        short = -self.in_features % width
        W = F.pad(self.W.unsqueeze(0), (0, short), mode="replicate").squeeze(0) if short else self.W
        W = W.reshape(len(W), -1, width)
        high = torch.sigmoid(self.gamma).unsqueeze(-1) * W.amax(-1, keepdim=True).clamp(min=0)
        low = torch.sigmoid(self.beta).unsqueeze(-1) * W.amin(-1, keepdim=True).clamp(max=0)
        s = (high - low) / top
        s = s + (s.half().float() - s).detach()
        z = (-low / s).round().clamp(0, top).detach()
        Q = W / s
        Q = Q.round().detach() + (Q - Q.detach())
        Q = s * (torch.clamp(Q + z, 0, top) - z)
        return Q.reshape(len(W), -1)[:, : self.in_features]


def reference_block(block: nn.Module) -> nn.Module:
    """A copy of a block in which LoRA was put on FakeQuantLinear, with ReferenceLinear in the place of both."""
    twin = copy.deepcopy(block)
    for name, layer in list(twin.named_modules()):
        base = getattr(layer, "base_layer", None)
        if isinstance(base, FakeQuantLinear):
            adapter = layer.active_adapters[0]  # type: ignore[union-attr,index]
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[union-attr,index]
            replace(twin, name, ReferenceLinear(base, A, B, layer.scaling[adapter]))  # type: ignore[union-attr,index]
    return twin
