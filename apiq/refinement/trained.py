"""What is trained of a packed model: its adapters, and the scales of its linears."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apiq.adapters.pooled import Pooling, is_pooled
from apiq.blocks.architecture import replace
from apiq.errors import ApiqError
from apiq.grids.absmax import rounded
from apiq.layers.packed import PackedLinear
from apiq.layers.scaled import ScaledLinear
from apiq.methods.flat import Group
from apiq.refine_params import RefineParams


class Trained:
    """A packed model with its adapters open, and with ScaledLinear for PackedLinear where scales are trained."""

    def __init__(self, model: Any, scales: bool, adapter_bits: int | None = None):
        """Open the adapters of `model`, which is changed in place, and its `scales`.

        Pooled adapters stay pooled. With `adapter_bits` the model computes with adapters that are rounded to so many
        bits, straight-through.

        Scales that are stored in 8 bits (double quantization) stay as they are.

        Raises:
            ApiqError: nothing can be.
        """
        self.model = model
        adapted = isinstance(model, peft.PeftModel)
        self.base: nn.Module = model.get_base_model() if adapted else model.requires_grad_(False)
        self.adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self.adapters:
            parameter.data = parameter.data.float()
        pools = adapter_bits is None and is_pooled(model)  # few bits have groups of their own
        self.pooling = Pooling(model, "pooled") if pools else None
        self.rounded: list[nn.Module] = []
        if adapter_bits is not None:
            self._round(adapter_bits)
        self.scaled: dict[str, ScaledLinear] = {}
        for name, module in list(self.base.named_modules()):
            if scales and isinstance(module, PackedLinear) and not module.doubly_quantized:
                self.scaled[name.replace(".base_layer", "")] = scaled = ScaledLinear(module)
                replace(self.base, name, scaled)
        if not (self.adapters or self.scaled):
            raise ApiqError(
                "the model has neither adapters nor scales that can be trained: "
                + ("its scales are stored in 8 bits." if scales else "set refine.lr_scales, as in 0.001.")
            )

    def _round(self, bits: int) -> None:
        """Let the linears of the adapters compute with rounded weights; other matrices are rounded when stored."""
        opened = {id(parameter) for parameter in self.adapters}
        for module in list(self.model.modules()):
            if isinstance(module, nn.Linear) and id(module._parameters.get("weight")) in opened:
                parametrize.register_parametrization(module, "weight", _Rounded(bits))
                self.rounded.append(module)

    def settle(self) -> None:
        """End the training: the adapters are what the model computed with."""
        if self.pooling is not None:
            self.pooling.release()
        for module in self.rounded:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        self.rounded = []

    def groups(self, params: RefineParams) -> list[Group]:
        """Adapters and scales with their learning rates."""
        factors = [scaled.factor for scaled in self.scaled.values()]
        adapters = Group(self.adapters, params.lr_adapter, params.weight_decay)
        return [adapters, Group(factors, params.lr_scales, 0.0)]

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the blocks for the backward pass. Dropout, which comes with it, is turned off."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        how = {"use_reentrant": False}
        self.base.activation_checkpointing_enable(how)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def scales(self) -> dict[str, Tensor]:
        """The trained scales (out, G) as they are stored, by the name of their linear in the model."""
        return {name: scaled.settled().scales for name, scaled in self.scaled.items()}

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters under the names that PEFT saves them by; empty where there are none."""
        if not isinstance(self.model, peft.PeftModel):
            return {}
        return peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)


class _Rounded(nn.Module):
    """A weight as it is stored in few bits."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return rounded(weight, self.bits)
