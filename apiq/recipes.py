"""Named settings of the two phases that fit a model, for the keys that are left open.

`paper` are the settings of the ApiQ paper (arXiv 2402.05147, Table A.1), which has no refinement; `best` gives the
least loss that was measured here; `fast` starts A and B at the closed form, passes once over the windows, at twice the
rate, leaves the weights as they are, and has no refinement (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["paper", "best", "fast"]

PAPER: dict[str, dict[str, Any]] = {
    "quantize": {
        "ranges": "whole",
        "start": "default",
        "epochs": 20,
        "batch_size": 1,
        "shuffle": False,
        "schedule": "constant",
        "lr_theta": 0.005,
        "decay_theta": 0.1,
        "lr_weight": 0.0,
        "lr_adapter": 0.0005,
        "decay_adapter": 0.1,
    },
    "refine": {"epochs": 0, "generated": 0},
}
BEST: dict[str, dict[str, Any]] = {
    "quantize": {
        "ranges": "output",
        "start": "default",
        "epochs": 5,
        "batch_size": 1,
        "shuffle": True,
        "schedule": "cosine",
        "lr_theta": 0.005,
        "decay_theta": 0.0,
        "lr_weight": 0.002,
        "lr_adapter": 0.002,
        "decay_adapter": 0.0,
    },
    "refine": {"epochs": 2, "generated": 8},
}
FAST: dict[str, dict[str, Any]] = {
    "quantize": {
        **BEST["quantize"],
        "ranges": "weight",
        "start": "closed-form",
        "epochs": 1,
        "lr_weight": 0.0,
        "lr_adapter": 0.004,
    },
    "refine": {"epochs": 0, "generated": 0},
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {"paper": PAPER, "best": BEST, "fast": FAST}


def filled(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section with those of its recipe for the keys that are missing or empty.

    A closed form is known for plain LoRA alone; other adapters start where they start by themselves. Weights
    are trained by the methods that descend on a block or a layer of it.
    """
    recipe = RECIPES.get(str(values.get("recipe") or "best"), {}).get(section, {})
    open_keys = {key: value for key, value in recipe.items() if values.get(key) is None}
    if "start" in open_keys and not _has_plain_lora(values):
        open_keys["start"] = "default"
    if "lr_weight" in open_keys and values.get("method") not in (None, "apiq-lw", "apiq-bw"):
        open_keys["lr_weight"] = 0.0
    return {**values, **open_keys}


def _has_plain_lora(values: Mapping[str, Any]) -> bool:
    lora = values.get("adapter") in (None, "lora")
    return lora and not values.get("adapter_options") and not values.get("pooled")
