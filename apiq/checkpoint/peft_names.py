"""PEFT on a mixture of experts: adapters go where the checkpoint says.

PEFT rewrites the targets of an adapter made for the layout in which transformers 4 kept experts,
one linear each, to the fused tensors of transformers 5. In a model loaded by apiq the experts are
linears of their own again, so its adapters must be taken as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from apiq.blocks.unfuse import Experts

CONVERSIONS = ("convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers")


def respect_unfused_experts(conversions: Any) -> None:
    """Let the functions of `peft.utils.transformers_weight_conversion` pass models with unfused experts by."""
    for name in CONVERSIONS:
        setattr(conversions, name, _passing_by(getattr(conversions, name)))


def _passing_by(convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model = kwargs["model"]
        if any(isinstance(module, Experts) for module in model.modules()):
            return kwargs.get("adapter_state_dict")
        return convert(*args, **kwargs)

    return wrapped
