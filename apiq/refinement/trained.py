"""What is trained of a packed model: its adapters, and the scales of its linears."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from apiq.adapters.pooled import Pooling, is_pooled
from apiq.blocks.architecture import replace
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
        """
        self.model = model
        adapted = isinstance(model, peft.PeftModel)
        self.base: nn.Module = model.get_base_model() if adapted else model.requires_grad_(False)
        self.adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self.adapters:
            parameter.data = parameter.data.float()
        pools = adapter_bits is None and is_pooled(model)  # few bits have groups of their own
        self.pooling = Pooling(model, "pooled") if pools else None
        self.rounded: list[tuple[nn.Module, str]] = []
        if adapter_bits is not None:
            self._round(adapter_bits)
        self.scaled: dict[str, ScaledLinear] = {}
        for name, module in list(self.base.named_modules()):
            if scales and isinstance(module, PackedLinear) and not module.doubly_quantized:
                self.scaled[name.replace(".base_layer", "")] = scaled = ScaledLinear(module)
                replace(self.base, name, scaled)

    def _round(self, bits: int) -> None:
        """Let the model compute with adapters whose matrices are rounded, as they will be stored."""
        opened = {id(parameter) for parameter in self.adapters if parameter.ndim >= 2}
        for module in list(self.model.modules()):
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in opened:
                    parametrize.register_parametrization(module, name, _Rounded(bits))
                    self.rounded.append((module, name))

    def settle(self) -> None:
        """End the training: the adapters are what the model computed with."""
        if self.pooling is not None:
            self.pooling.release()
        for module, name in self.rounded:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        self.rounded = []

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Let the model compute with the adapters in `state`, under the names of `adapter_state`."""
        if isinstance(self.model, peft.PeftModel):
            peft.set_peft_model_state_dict(self.model, dict(state))

    def groups(self, params: RefineParams) -> list[Group]:
        """Adapters and scales with their learning rates."""
        factors = [scaled.factor for scaled in self.scaled.values()]
        adapters = Group(self.adapters, params.lr_adapter, params.weight_decay)
        return [adapters, Group(factors, params.lr_scales, 0.0)]

    @contextlib.contextmanager
    def recomputing(self, blocks: str) -> Iterator[None]:
        """Within it the list of `blocks` of that name keeps only their inputs for the backward pass.

        The model need not be in training mode for it, in which it would drop activations at random.
        """
        modules = list(self.base.get_submodule(blocks).children())
        try:
            for block in modules:
                again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                block.forward = again
            yield
        finally:
            for block in modules:
                block.__dict__.pop("forward", None)

    @torch.no_grad()
    def scales(self) -> dict[str, Tensor]:
        """The trained scales (out, G) as they are stored, by the name of their linear in the model."""
        return {name: scaled.settled().scales for name, scaled in self.scaled.items()}

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapters under the names that PEFT saves them by; empty where there are none."""
        if not isinstance(self.model, peft.PeftModel):
            return {}
        state = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {name: value.clone() for name, value in state.items()}


class _Rounded(nn.Module):
    """A weight as it is stored in few bits."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return rounded(weight, self.bits)
