"""What methods cannot be combined with: refused with the key, the value and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apiq.adapters.tuners import TUNERS
from apiq.grids.levels import TERNARY
from apiq.method_params import NORMAL_FLOAT_BITS
from apiq.refusals import require

if TYPE_CHECKING:
    from apiq.quantize_params import QuantizeParams


def combinations(params: QuantizeParams) -> None:
    """Refuse levels and adapters that the method does not have.

    Raises:
        ValueError: the first such parameter; `apiq.refusals.sentence` knows how to read it.
    """
    if params.normal_float:
        low, high = NORMAL_FLOAT_BITS
        levels = f"the NormalFloat of method {params.method}"
        require(low <= params.bits <= high, "bits", params.bits, f"{low} to {high} for {levels}")
        require(not params.symmetric, "symmetric", params.symmetric, f"false for {levels}, which has no zero points")
    if params.target_bits is not None:
        low, high = NORMAL_FLOAT_BITS if params.normal_float else (2 if params.symmetric is True else 1, 8)
        asked = params.candidate_bits
        fits = all(low <= bits <= high or (bits == TERNARY and not params.normal_float) for bits in asked)
        require(fits, "candidate_bits", asked, f"{low} to {high} for these levels")
        least = min(asked)
        told = f"more than {least}, the least of candidate_bits: scales are counted too"
        require(params.target_bits > least, "target_bits", params.target_bits, told)
    if params.candidate_ranks:
        ranks = params.candidate_ranks
        require(params.adapted, "candidate_ranks", ranks, "empty where there are no adapters")
        require(min(ranks) <= params.rank, "candidate_ranks", ranks, f"one of them at most rank, {params.rank}")
        own = params.adapter in ("lora", "rslora", "dora")
        require(own, "adapter", params.adapter, "lora, rslora or dora with candidate_ranks, as others have one for all")
    fitted = params.method in ("loftq", "lq-lora", "closed-form")
    if fitted or (params.start == "closed-form" and params.method in ("apiq-lw", "apiq-bw")):
        what = f"method {params.method}" if fitted else "start closed-form"
        require(params.adapter == "lora", "adapter", params.adapter, f"lora for {what}, which finds its A and B")
        options = params.adapter_options
        require(not options, "adapter_options", options, f"{{}} for {what}, which finds A and B of plain LoRA")
    if params.pooled:
        methods = ("apiq-lw", "apiq-bw", "gptq-lora")
        require(
            params.method in methods, "pooled", True, f"false for method {params.method}; {', '.join(methods)} have it"
        )
        require(params.adapter in ("lora", "rslora"), "adapter", params.adapter, "lora or rslora when pooled is true")
        require(params.start == "default", "start", params.start, "default when pooled is true")
    descends = params.method in ("apiq-lw", "apiq-bw", "omniquant")
    for key, none in (("rounding", "straight-through"), ("held_out", 0), ("patience", 0)):
        told = f"{none} for method {params.method}; apiq-lw, apiq-bw and omniquant descend"
        require(descends or getattr(params, key) == none, key, getattr(params, key), told)
    if params.lr_weight:
        what = f"0 for method {params.method}; apiq-lw and apiq-bw train W"
        require(params.method in ("apiq-lw", "apiq-bw"), "lr_weight", params.lr_weight, what)
    if params.method in ("qlora", "gptq-lora") and params.adapter != "none":
        moves = TUNERS[params.adapter].moves_weight
        require(not moves, "adapter", params.adapter, f"one that starts at no change for method {params.method}")
