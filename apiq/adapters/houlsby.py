"""The bottleneck adapter of Houlsby et al. (arXiv 1902.00751), as a tuner of PEFT, which has none.

It stands on the output of the attention and of the feed-forward part, before the residual sum (figure 2
there), which is the output of their last linear:

    Y = X Q^T + bias,    Y' = Y + f(Y D^T + d) U^T + u

with D (r, out), U (out, r) and f the GELU of their code. U and u start at 0, so that Y' = Y: the paper starts
close to the identity, here it is the identity. Importing this module registers it: PEFT then reads and writes
adapters of type HOULSBY like its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import peft.mapping as registry
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

TYPE: Any = "HOULSBY"
"""PEFT's types are an enumeration of strings, which knows this one by its string alone."""
PREFIX = "houlsby_"


@dataclass
class HoulsbyConfig(PeftConfig):
    """Bottleneck adapters of width `r` with the activation `act_fn` of transformers on `target_modules`."""

    r: int = field(default=64, metadata={"help": "width of the bottleneck"})
    act_fn: str = field(default="gelu", metadata={"help": "name of the nonlinearity in transformers"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linears that carry an adapter"})

    def __post_init__(self):
        """Name the type."""
        super().__post_init__()
        self.peft_type = TYPE
        if self.act_fn not in ACT2FN:
            raise ValueError(f"act_fn is {self.act_fn!r}, which is no activation of transformers")


class HoulsbyLinear(nn.Module, BaseTunerLayer):
    """A linear with a bottleneck behind it."""

    adapter_layer_names = ("houlsby_down", "houlsby_up")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: HoulsbyConfig):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.houlsby_down, self.houlsby_up = nn.ModuleDict(), nn.ModuleDict()
        self.activations: dict[str, nn.Module] = {}
        self.merged_adapters = []
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: HoulsbyConfig) -> None:
        """One more adapter, in the precision and on the device of the linear."""
        self.houlsby_down[adapter_name] = nn.Linear(self.out_features, config.r)
        self.houlsby_up[adapter_name] = nn.Linear(config.r, self.out_features)
        for parameter in self.houlsby_up[adapter_name].parameters():
            nn.init.zeros_(parameter)
        self.activations[adapter_name] = ACT2FN[config.act_fn]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Y' for x (..., in), in the precision of Y."""
        Y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return Y
        for name in self.active_adapters:
            if name in self.houlsby_down:
                down, up = cast(nn.Linear, self.houlsby_down[name]), self.houlsby_up[name]
                hidden = self.activations[name](down(self._cast_input_dtype(Y, down.weight.dtype)))
                Y = Y + up(hidden).to(Y.dtype)
        return Y


class HoulsbyModel(BaseTuner):
    """Puts the adapters on a model."""

    prefix = PREFIX
    tuner_layer_cls = HoulsbyLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (declared so by PEFT)

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, HoulsbyLinear):
            target.add(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear):
            raise TypeError(f"{current_key} is a {type(target).__name__}, a Houlsby adapter stands on an nn.Linear")
        new = HoulsbyLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)


def _register() -> None:
    """What `peft.utils.register_peft_method` does, which takes only the types that PEFT itself lists."""
    registry.PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = HoulsbyConfig
    registry.PEFT_TYPE_TO_TUNER_MAPPING[TYPE] = HoulsbyModel
    registry.PEFT_TYPE_TO_PREFIX_MAPPING[TYPE] = PREFIX


_register()
