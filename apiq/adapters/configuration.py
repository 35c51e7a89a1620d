"""From parameters to a PEFT config: for one block while it is fitted, for the whole model when it is written."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft

from apiq.adapters import houlsby
from apiq.adapters.targets import Shapes, feed_forward, outputs, select
from apiq.adapters.tuners import TUNERS, Site, Tuner, whole
from apiq.errors import ApiqError
from apiq.params import QuantizeParams

Pattern = Callable[[list[str]], str]
NO_RANKS: Mapping[str, int] = {}

OWNED = {
    "alpha_pattern", "arrow_config", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "feedforward_modules", "init_ia3_weights", "init_weights", "layer_replication",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "rank_pattern", "runtime_config", "save_indices", "save_only_topk_weights",
    "save_precomputed_indices", "save_projection", "target_modules", "target_parameters", "target_r",
    "trainable_token_indices", "weight_tying",
}  # fmt: skip
"""Fields of PEFT's configs that decide where adapters are, how they start and what is saved: not for the user."""
STARTS = re.compile(r"gaussian|pissa(_niter_\d+)?|olora")
"""Starts of LoRA that need nothing but the weight."""


def block_config(
    params: QuantizeParams, linears: Shapes, start: bool = False, ranks: Mapping[str, int] = NO_RANKS
) -> peft.PeftConfig:
    """The config that puts the adapters of `params` on one block with these linears.

    `start` is for the block that is to be fitted: its adapters start as they should. The others are loaded.
    `ranks` are those of linears with a rank of their own, by name in the block.

    Raises:
        ApiqError: targets or options that the block or PEFT does not know, or sizes that the tuner cannot take.
    """
    carriers = targets(params, linears, strict=False) if ranks else ()
    return _config(params, linears, _pattern, start, {name: ranks[name] for name in carriers if name in ranks})


def model_config(
    params: QuantizeParams, linears: Shapes, path: str, ranks: Mapping[str, int] = NO_RANKS
) -> peft.PeftConfig:
    """The config that finds the same adapters in every block of the list `path` of the whole model.

    `ranks` are those of linears with a rank of their own, by name in the model.
    """
    return _config(params, linears, lambda names: rf"{re.escape(path)}\.\d+\.{_pattern(names)}", False, ranks)


def resolved(params: QuantizeParams, blocks: Sequence[Shapes]) -> QuantizeParams:
    """`params` with the targets spelled out, after a look at the linears of every block of a model.

    Blocks may hold different linears, as those of a hybrid do; a block without any target carries no adapter.

    Raises:
        ApiqError: as `block_config`; or the config of one block is not that of the others, or the tuner shares a
            part between blocks that are not alike.
    """
    union = {name: shape for block in blocks for name, shape in block.items()}
    params = params.model_copy(update={"adapter_targets": targets(params, union)})
    whole = _site(params, union, _pattern)
    model_config(params, union, "")
    for block in blocks:
        if not targets(params, block, strict=False):
            continue
        block_config(params, block, start=True)
        if not _agree(TUNERS[params.adapter], _site(params, block, _pattern), whole, dict(block) == dict(blocks[0])):
            raise ApiqError(
                f"quantize.adapter is {params.adapter}, which needs the same linears in all blocks, and those of this "
                "model differ; choose one that takes any linear for itself, such as lora."
            )
    return params


def targets(params: QuantizeParams, linears: Shapes, strict: bool = True) -> list[str]:
    """The names of the linears of a block that carry adapters.

    Raises:
        ApiqError: with `strict`, an entry of `quantize.adapter_targets` finds no linear, or the tuner none to
            stand on.
    """
    chosen = select(linears, params.adapter_targets, strict)
    if not TUNERS[params.adapter].at_outputs or not {"all", "attn", "ffn"} & set(params.adapter_targets):
        return chosen
    ends = [name for name in outputs(linears) if name in chosen]
    if strict and not ends:
        raise ApiqError(
            f"quantize.adapter is {params.adapter}, which stands on the linears that end the attention and the "
            f"feed-forward part, and none is found; name them in quantize.adapter_targets, out of {', '.join(linears)}."
        )
    return ends


def _config(
    params: QuantizeParams, linears: Shapes, pattern: Pattern, start: bool, ranks: Mapping[str, int]
) -> peft.PeftConfig:
    tuner, site = TUNERS[params.adapter], _site(params, linears, pattern)
    _check_rank(params, tuner, site.shapes)
    settings = {**tuner.settings(site), **options(params, tuner)}
    settings |= _own_ranks(params, ranks, bool(settings.get("use_rslora")))
    if tuner.moves_weight and not start:
        settings["init_lora_weights"] = True  # what it moved out of W is in the adapters that are loaded
    try:
        return config_class(tuner)(target_modules=pattern(list(site.shapes)), **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise refused(params, error) from None


def _own_ranks(params: QuantizeParams, ranks: Mapping[str, int], by_root: bool) -> dict[str, Any]:
    """The fields of a LoRA that has these ranks, and on every linear the scaling of `alpha` at `rank`.

    Engines that look at r and lora_alpha alone thus find room for every rank, and the scaling of every linear, which
    is alpha / sqrt(r) instead of alpha / r where it is `by_root`.
    """
    if not ranks:
        return {}
    power = 0.5 if by_root else 1.0
    alphas = {rank: params.alpha * (rank / params.rank) ** power for rank in ranks.values()}
    largest = max(alphas)
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}  # PEFT takes ends too
    return {
        "r": largest,
        "lora_alpha": whole(alphas[largest]),
        "rank_pattern": others,
        "alpha_pattern": {name: whole(alphas[rank]) for name, rank in others.items()},
    }


def _site(params: QuantizeParams, linears: Shapes, pattern: Pattern) -> Site:
    names = targets(params, linears, strict=False)
    down = [name for name in outputs(linears) if name in names and name in feed_forward(linears)]
    return Site(params.rank, params.alpha, params.seed, {name: linears[name] for name in names}, pattern, down)


def _agree(tuner: Tuner, own: Site, whole: Site, alike: bool) -> bool:
    """Whether the adapters of a block are what the config of the whole model makes of them."""
    if tuner.shared:
        return alike
    mine, all_ = (tuner.settings(dataclasses.replace(site, down=[])) for site in (own, whole))
    sizes = all(
        value.items() <= all_[key].items() if isinstance(value, dict) else value == all_[key]
        for key, value in mine.items()
    )
    down = own.down == [name for name in whole.down if name in own.shapes]
    return sizes and (down or "feedforward_modules" not in mine)


def config_class(tuner: Tuner) -> Any:
    """The config class of a tuner, PEFT's or our own."""
    return houlsby.HoulsbyConfig if tuner.config == "HoulsbyConfig" else getattr(peft, tuner.config)


def refused(params: QuantizeParams, error: Exception) -> ApiqError:
    """What PEFT refused, as one sentence."""
    return ApiqError(f"quantize.adapter is {params.adapter}, and PEFT refuses it here: {' '.join(str(error).split())}")


def options(params: QuantizeParams, tuner: Tuner) -> dict[str, Any]:
    """quantize.adapter_options, once each is known to be a field of the tuner's config that may be set.

    Raises:
        ApiqError: one is not.
    """
    known = {field.name for field in dataclasses.fields(config_class(tuner))}
    common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    free = known - common - OWNED
    for key, value in params.adapter_options.items():
        place = f"quantize.adapter_options.{key}"
        if key == "init_lora_weights" and key in known:
            if not (isinstance(value, str) and STARTS.fullmatch(value) and _same_kind(value, tuner)):
                kinds = "pissa or pissa_niter_N, olora" if tuner.moves_weight else "gaussian"
                raise ApiqError(f"{place} is {value!r}; it should be {kinds} for quantize.adapter {params.adapter}.")
        elif key == "use_qalora":
            raise ApiqError(f"{place} cannot be set: PEFT pools inputs on GPTQ's layers only and would ignore it here.")
        elif key in known and key not in free:
            raise ApiqError(f"{place} cannot be set: apiq itself decides it.")
        elif key not in free:
            near = difflib.get_close_matches(key, sorted(free), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(free))}."
            raise ApiqError(f"{place} is no option of PEFT's {tuner.config}; {hint}")
    return dict(params.adapter_options)


def _same_kind(start: str, tuner: Tuner) -> bool:
    """Only a tuner that moves weight may start by moving it."""
    return (start != "gaussian") == tuner.moves_weight


def _check_rank(params: QuantizeParams, tuner: Tuner, shapes: Shapes) -> None:
    smallest = min((min(shape), name) for name, shape in shapes.items())
    key, rank = params.largest_rank
    if tuner.bounded and rank > smallest[0]:
        raise ApiqError(
            f"quantize.{key} is {rank}; it must be at most {smallest[0]}, the smaller side of {smallest[1]}."
        )


def _pattern(names: list[str]) -> str:
    return f"({'|'.join(re.escape(name) for name in names)})"
