"""Named settings of the two phases that fit a model, for the keys that are left open.

`paper` are the settings of the ApiQ paper (arXiv 2402.05147, Table A.1), which has no refinement; `best` gives the
least loss that was measured here; `fast` passes once over the windows, at twice the rate, and has no refinement
(docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["paper", "best", "fast"]

PAPER: dict[str, dict[str, Any]] = {
    "quantize": {
        "ranges": "whole",
        "epochs": 20,
        "batch_size": 1,
        "shuffle": False,
        "schedule": "constant",
        "lr_theta": 0.005,
        "decay_theta": 0.1,
        "lr_adapter": 0.0005,
        "decay_adapter": 0.1,
    },
    "refine": {"epochs": 0, "generated": 0},
}
BEST: dict[str, dict[str, Any]] = {
    "quantize": {
        "ranges": "output",
        "epochs": 5,
        "batch_size": 1,
        "shuffle": True,
        "schedule": "cosine",
        "lr_theta": 0.005,
        "decay_theta": 0.0,
        "lr_adapter": 0.002,
        "decay_adapter": 0.0,
    },
    "refine": {"epochs": 2, "generated": 8},
}
FAST: dict[str, dict[str, Any]] = {
    "quantize": {**BEST["quantize"], "ranges": "weight", "epochs": 1, "lr_adapter": 0.004},
    "refine": {"epochs": 0, "generated": 0},
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {"paper": PAPER, "best": BEST, "fast": FAST}


def filled(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section with those of its recipe for the keys that are missing or empty."""
    recipe = RECIPES.get(str(values.get("recipe") or "best"), {}).get(section, {})
    open_keys = {key: value for key, value in recipe.items() if values.get(key) is None}
    return {**values, **open_keys}
