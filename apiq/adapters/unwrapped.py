"""The model inside PEFT's wrapper."""

from __future__ import annotations

from typing import Any

from peft import PeftModel


def unwrapped(model: Any) -> Any:
    """The model of transformers, adapters in its layers, whether PEFT wraps it or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
