"""LoRA whose A is constant within the groups of the grid below it: group-pooled (QA-LoRA, arXiv 2309.14717).

With one number for each group, V (r, G), spread over the columns of its group as A (r, in), the update is constant
within groups as well, and

    Q + c B A = s (codes - z) + o,    o = c B V (out, G),    c = alpha / r

so it can be merged into zero points. QA-LoRA sums X over the groups and keeps V alone, which is the same function.
Here PEFT's LoRA stays as it is, and its A is kept constant while an optimizer moves it.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.errors import ApiqError
from apiq.grids.normal_float import NormalFloat
from apiq.layers.fake_quant import FakeQuantLinear
from apiq.layers.packed import PackedLinear


def sizes(A: Tensor, width: int) -> Tensor:
    """Columns of each group of A (r, in), (G); the last one may have fewer than `width`."""
    starts = torch.arange(0, A.shape[1], width, device=A.device)
    return (A.shape[1] - starts).clamp(max=width)


def means(A: Tensor, width: int) -> Tensor:
    """The mean of A (r, in) over each group of columns, (r, G)."""
    padded = F.pad(A, (0, -A.shape[1] % width))
    return padded.reshape(len(A), -1, width).sum(-1) / sizes(A, width)


def spread(V: Tensor, width: int, columns: int) -> Tensor:
    """V (r, G) with each number in all columns of its group, (r, columns)."""
    return V.repeat_interleave(width, 1)[:, :columns]


def values(A: Tensor, width: int) -> Tensor | None:
    """V (r, G) of which A (r, in) is the spread; None where A is not constant within groups, bit for bit."""
    V = A[:, ::width]
    return V if torch.equal(spread(V, width, A.shape[1]), A) else None


def pooled(A: Tensor, B: Tensor, width: int) -> Tensor:
    """A (r, in) made constant within groups, (r, in), for B (out, r); one that is so already stays as it is.

    The group means: of all constant ones c B means(A) is the nearest to c B A. Where B = 0 nothing was fitted yet and
    A is a random start; the mean of w independent numbers is smaller by sqrt(w), and with it X A^T for an X whose
    entries are uncorrelated. There the means are multiplied by sqrt(w), so that B gets gradients of the usual size.
    """
    if values(A, width) is not None:
        return A.clone()
    V = means(A, width)
    if not bool(B.any()):
        V = V * sizes(A, width).sqrt()
    return spread(V, width, A.shape[1]).contiguous()


def is_only_lora(layer: object) -> TypeGuard[lora.Linear]:
    """Whether the layer adds c X A^T B^T and nothing else; dropout on X, which training alone has, may be there."""
    if not isinstance(layer, lora.Linear) or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return name not in layer.lora_variant and not layer.lora_bias[name] and not layer.fan_in_fan_out


def is_pooled(model: nn.Module) -> bool:
    """Whether every adapter of a packed model is LoRA whose A is constant within groups."""
    carriers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return bool(carriers) and all(_is_pooled(layer) for layer in carriers)


def _is_pooled(layer: BaseTunerLayer) -> bool:
    base = layer.get_base_layer()
    if not is_only_lora(layer) or not isinstance(base, PackedLinear):
        return False
    return (
        not isinstance(base.grid, NormalFloat)
        and values(factors(layer)[0], base.grid.width(base.in_features)) is not None
    )


def factors(layer: lora.Linear) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A (r, in), B (out, r) and c of a layer that `is_only_lora`."""
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]  # type: ignore[return-value]


class Pooling:
    """Pools the LoRA of a model, and keeps it pooled while it is trained.

    The gradient of A is replaced by its group means, so that an optimizer which treats all entries alike moves those
    of a group alike. Fused ones do so but for the last bit: the end of a tensor that fills no vector register is
    rounded in another way. `settle` after each step takes that out.
    """

    def __init__(self, model: nn.Module, key: str):
        """Pool every A of `model`, whose linears below it are packed or to be; `key` is the parameter that asks for it.

        Raises:
            ApiqError: an adapter is not plain LoRA, or the grid below it has no zero points.
        """
        carriers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        if not carriers:
            raise ApiqError(f"{key} is true, and the model has no LoRA; quantize with quantize.adapter: lora.")
        self._pools = [(_checked(name, layer, key), _width(name, layer, key)) for name, layer in carriers.items()]
        self.change = self._start()
        hooks = [(factors(layer)[0], functools.partial(_averaged, width)) for layer, width in self._pools]
        self._hooks = [A.register_hook(hook) for A, hook in hooks]

    @torch.no_grad()
    def _start(self) -> float:
        moved = whole = 0.0
        for layer, width in self._pools:
            A, B, _ = factors(layer)
            new = pooled(A, B, width)
            moved, whole = moved + float((new - A).square().sum()), whole + float(A.square().sum())
            A.copy_(new)
        return (moved / whole) ** 0.5 if whole else 0.0

    @torch.no_grad()
    def settle(self) -> None:
        """Give all entries of a group the value of the first."""
        for layer, width in self._pools:
            A, _, _ = factors(layer)
            A.copy_(spread(A[:, ::width], width, A.shape[1]))

    def release(self) -> None:
        """Settle, and leave the gradients alone from now on."""
        self.settle()
        for hook in self._hooks:
            hook.remove()


def _averaged(width: int, grad: Tensor) -> Tensor:
    return spread(means(grad, width), width, grad.shape[1])


def _checked(name: str, layer: BaseTunerLayer, key: str) -> lora.Linear:
    if not is_only_lora(layer):
        raise ApiqError(
            f"{key} is true, and the adapter on {name} is not plain LoRA; set it to false, or quantize with "
            "quantize.adapter lora or rslora and no options that change it."
        )
    return layer


def _width(name: str, layer: BaseTunerLayer, key: str) -> int:
    base = layer.get_base_layer()
    if not isinstance(base, PackedLinear | FakeQuantLinear) or isinstance(base.grid, NormalFloat):
        what = "has NormalFloat levels" if isinstance(base, PackedLinear) else "is not quantized"
        raise ApiqError(
            f"{key} is true, and {name} {what} and so no zero points to merge into; set it to false, or quantize with "
            "a method of uniform levels."
        )
    return base.grid.width(base.in_features)
