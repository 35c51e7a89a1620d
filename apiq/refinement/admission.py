"""Folders and models that cannot be refined, or not so: refused before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from apiq import parallel
from apiq.adapters.tuners import TUNERS
from apiq.adapters.unwrapped import unwrapped
from apiq.errors import ApiqError
from apiq.layers.packed import PackedLinear
from apiq.refine_params import RefineParams
from apiq.refinement.hidden import head_of


def refuse_folder(folder: Path, facts: Mapping[str, Any], params: RefineParams) -> None:
    """Refuse a checkpoint whose manifest says that it cannot be refined by `params`.

    Raises:
        ApiqError: it is finetuned, its adapters take a part of themselves from the weight whose scales are to be
            trained, or several processes were started.
    """
    if parallel.launched() > 1:
        raise ApiqError("refine runs in one process; start it without torchrun.")
    if facts["kind"] != "quantized":
        base = f", here {facts['base']} as seen from it" if "base" in facts else ""
        raise ApiqError(f"{folder} is {facts['kind']}; refine comes before it, so give the quantized folder{base}.")
    adapter = facts.get("parameters", {}).get("adapter")
    if params.lr_scales and (folder / "adapter").is_dir() and adapter in TUNERS and not TUNERS[adapter].joint:
        raise ApiqError(
            f"refine.lr_scales is {params.lr_scales:g}, but {adapter} takes a part of itself from the weight, or "
            "passes no gradient to it, so scales cannot be trained under it; set it to 0."
        )


def refuse_model(model: Any, params: RefineParams) -> None:
    """Refuse a model that cannot be refined by `params`; it must be in evaluation mode.

    Raises:
        ApiqError: nothing of it can be trained, it does not predict a token at every position, it cannot generate and
            is to, or it names no head and hidden states count.
    """
    base = unwrapped(model)
    name = type(base).__name__
    _refuse_untrainable(model, params)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        logits = getattr(model(input_ids=tokens), "logits", None)
    if logits is None or logits.shape[:-1] != tokens.shape:
        found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ApiqError(
            f"refine compares predictions of tokens at every position; {name} gives {found} for two tokens."
        )
    if params.generated and not base.can_generate():
        raise ApiqError(f"refine.generated is {params.generated}, but {name} cannot generate text; set it to 0.")
    if params.hidden_weight:
        head_of(model)


def _refuse_untrainable(model: Any, params: RefineParams) -> None:
    adapted = isinstance(model, PeftModel) and any(parameter.requires_grad for parameter in model.parameters())
    scales = any(isinstance(m, PackedLinear) and not m.doubly_quantized for m in model.modules())
    if adapted or (params.lr_scales and scales):
        return
    why = "set refine.lr_scales, as in 0.001." if scales else "its scales are stored in 8 bits."
    raise ApiqError(f"the model has neither adapters nor scales that can be trained: {why}")
