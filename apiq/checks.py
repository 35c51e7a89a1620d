"""Combinations of parameters, and of parameters and model, that cannot be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apiq.params import ModelParams, Params


def known_config(model: ModelParams) -> dict[str, Any] | None:
    """The content of the model's config.json as far as it is known without the network, else None."""
    return None


def check(params: Params, config: Mapping[str, Any] | None) -> None:
    """Refuse what cannot be run."""
