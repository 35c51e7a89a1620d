"""Combinations of parameters, and of parameters and model, that cannot be run: refused before any work.

`apiq.params` refuses what a section alone shows to be wrong; here the sections meet each other,
the model's config.json and the disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apiq.adapters.tuners import TUNERS
from apiq.calibration.corpora import NAMES, SUFFIXES
from apiq.calibration.hub import CORPORA
from apiq.errors import ApiqError
from apiq.files import read_json
from apiq.method_params import WITHOUT_ADAPTERS
from apiq.params import (
    CalibrationParams,
    EvaluateParams,
    FinetuneParams,
    ModelParams,
    Params,
    QuantizeParams,
    ReportParams,
)
from apiq.refine_params import RefineParams

Config = Mapping[str, Any]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head")


def check(params: Params, config: Config | None) -> None:
    """Refuse parameters that cannot be run together, on this disk, with this model.

    Args:
        params: all sections.
        config: the model's config.json as a mapping (see `known_config`); None where it is not known yet.

    Raises:
        ApiqError: the first such combination, with its key, its value and what is allowed.
    """
    check_model(params.model)
    check_calibration(params.calibration, config)
    check_quantize(params.quantize, config)
    check_finetune(params.finetune, config)
    check_evaluate(params.evaluate, config)
    check_apart([*_calibrated_on(params.calibration), *_trained_on(params.finetune)], params.evaluate)
    check_report(params.report, config)
    check_adapted(params.quantize, params.refine, params.finetune)


def known_config(model: ModelParams) -> dict[str, Any] | None:
    """The config.json of the model as far as it is known without the network: planned, on disk or in the hub's cache.

    Raises:
        ApiqError: the file is damaged.
    """
    if model.source == "demo":
        demo = model.demo
        return {
            "hidden_size": demo.hidden_size,
            "intermediate_size": demo.intermediate_size,
            "num_hidden_layers": demo.layers,
            "num_attention_heads": demo.heads,
            "num_key_value_heads": demo.kv_heads,
            "max_position_embeddings": demo.context,
        }
    if Path(model.source).is_dir():
        path = Path(model.source) / "config.json"
        return read_json(path) if path.exists() else None
    if not _HUB_NAME.fullmatch(model.source):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    return read_json(cached) if isinstance(cached, str) else None


def check_model(model: ModelParams) -> None:
    """Refuse a folder that is not there, a hub name without a revision, and a revision of anything else."""
    source, here = model.source, Path(model.source)
    if here.is_dir() and source != "demo":
        if not (here / "config.json").is_file():
            raise _refusal("model.source", source, "a folder with the config.json and the weights of a model")
        if model.revision is not None:
            raise _refusal("model.revision", model.revision, f"empty for the folder {source}")
    elif source == "demo":
        if model.revision is not None:
            raise _refusal("model.revision", model.revision, "empty for the demo model")
    elif here.exists() or source.endswith("/") or not _HUB_NAME.fullmatch(source):
        raise _refusal("model.source", source, "demo, a folder that is there, or a name on the hub such as owner/model")
    elif model.revision is None:
        raise ApiqError(
            f"model.revision is empty; {source} is no folder here, and a model on the hub should be pinned to a "
            "branch, tag or commit."
        )


def check_calibration(calibration: CalibrationParams, config: Config | None) -> None:
    """Refuse a corpus that is not there and windows beyond the context of the model."""
    for key, source in _calibrated_on(calibration):
        _check_corpus(key, source)
    _check_length("calibration.length", calibration.length, config)


def check_quantize(quantize: QuantizeParams, config: Config | None) -> None:
    """Refuse options that an adapter has not, a rank above the smaller side of a linear, and groups wider than rows."""
    if quantize.adapted and quantize.adapter_options:
        from apiq.adapters.configuration import options

        options(quantize, TUNERS[quantize.adapter])
    if config is None:
        return
    sides = _sides(config)
    everywhere = quantize.adapted and quantize.adapter_targets == ["all"]  # of others the walk knows the sides
    if sides and everywhere and TUNERS[quantize.adapter].bounded:
        name, smallest = min(sides.items(), key=lambda side: side[1])
        key, rank = quantize.largest_rank
        if rank > smallest:
            allowed = f"at most {smallest}, the smallest side of a linear ({name})"
            raise _refusal(f"quantize.{key}", rank, allowed)
    if sides and quantize.target_bits is None and quantize.group_size > max(sides.values()):
        widest = max(sides.values())
        allowed = f"at most {widest}, the widest row of a linear, or 0 for one group a row"
        raise _refusal("quantize.group_size", quantize.group_size, allowed)


def check_finetune(finetune: FinetuneParams, config: Config | None) -> None:
    """Refuse data that are not there and sequences beyond the context of the model."""
    if finetune.task == "none":
        return
    if finetune.task == "lm" and finetune.text is not None:
        _check_corpus("finetune.text", finetune.text)
    if finetune.task == "instruction" and finetune.pairs is not None:
        _check_files("finetune.pairs", finetune.pairs, (".jsonl", ".parquet"), names=())
    _check_length("finetune.length", finetune.length, config)


def check_adapted(quantize: QuantizeParams, refine: RefineParams, finetune: FinetuneParams) -> None:
    """Refuse to finetune what has no adapters, and to refine it where its scales stay too."""
    if quantize.adapted:
        return
    bare = quantize.method in WITHOUT_ADAPTERS
    key, value, other = ("method", quantize.method, "apiq-bw") if bare else ("adapter", "none", "lora")
    if finetune.task != "none":
        step, fix = "finetune", "finetune.task to none"
    elif refine.epochs and not refine.lr_scales:
        step, fix = "refine", "refine.epochs to 0"
    else:
        return
    raise ApiqError(
        f"quantize.{key} is {value}, which leaves no adapters to {step}; set {fix}, or take another {key}, "
        f"such as {other}."
    )


def check_evaluate(evaluate: EvaluateParams, config: Config | None) -> None:
    """Refuse corpora and task folders that are not there and windows beyond the context of the model."""
    for name, corpus in evaluate.perplexity.items():
        _check_corpus(f"evaluate.perplexity.{name}.text", corpus.text)
        _check_length(f"evaluate.perplexity.{name}.length", corpus.length, config)
    if evaluate.task_folder is not None and not Path(evaluate.task_folder).is_dir():
        raise _refusal("evaluate.task_folder", evaluate.task_folder, "a folder that is there, or empty")


def check_report(report: ReportParams, config: Config | None) -> None:
    """Refuse a block that the model does not have."""
    known = config or {}
    known = known.get("text_config") or known
    block, blocks = report.histogram_block, max((known[key] for key in _LAYERS if known.get(key)), default=0)
    if blocks and not -blocks <= block < blocks:
        allowed = f"0 to {blocks - 1}, or -1 to -{blocks} counted from the last, the blocks of the model"
        raise _refusal("report.histogram_block", block, allowed)


def check_apart(fitted: list[tuple[str, str]], evaluate: EvaluateParams) -> None:
    """Refuse to calibrate or train on the very corpus that is evaluated; `fitted` are corpora behind their keys."""
    for name, corpus in evaluate.perplexity.items():
        measured = _identity(corpus.text, "test")
        for key, source in fitted:
            if _identity(source, "train") == measured:
                raise ApiqError(
                    f"{key} is {source}, on which evaluate.perplexity.{name} measures; "
                    "it should be another corpus or another split."
                )


def _calibrated_on(calibration: CalibrationParams) -> list[tuple[str, str]]:
    """The corpora of the calibration windows, each behind the key that names it."""
    return [
        ("calibration.corpus", calibration.corpus),
        *(("a corpus of calibration.mixture", source) for source in calibration.mixture),
    ]


def _trained_on(finetune: FinetuneParams) -> list[tuple[str, str]]:
    """The corpus of the finetuning behind its key, where it is trained on text."""
    return [("finetune.text", finetune.text)] if finetune.task == "lm" and finetune.text is not None else []


def _check_corpus(key: str, source: str) -> None:
    name, colon, split = source.partition(":")
    if name not in NAMES:
        _check_files(key, source, SUFFIXES, NAMES)
    elif colon and split not in _splits(name):
        known = ", ".join(f"{name}:{each}" for each in _splits(name))
        raise _refusal(key, source, f"{name}, or one split of it: {known}")


def _check_files(key: str, source: str, suffixes: tuple[str, ...], names: tuple[str, ...]) -> None:
    path = Path(source)
    if not source or not (path.is_dir() or (path.is_file() and path.suffix in suffixes)):
        kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]} file that is there"
        others = f", a folder of them, or one of {', '.join(names)}" if names else " or a folder of them"
        raise _refusal(key, repr(source), f"a {kinds}{others}")


def _check_length(key: str, length: int, config: Config | None) -> None:
    context = _first(config, _CONTEXT) if config is not None else None
    if context is not None and length > context:
        raise _refusal(key, length, f"at most {context}, the context of the model")


def _splits(name: str) -> tuple[str, ...]:
    if name == "demo":
        from apiq.calibration.demo_corpus import SPLITS

        return tuple(SPLITS)
    return CORPORA[name].splits


def _identity(source: str, default: str) -> str:
    """The corpus and split that are read, or the whole path of files."""
    name, _, split = source.partition(":")
    if name not in NAMES:
        return str(Path(source).resolve())
    reported = default if default in _splits(name) else CORPORA[name].reported
    return f"{name}:{split or reported}"


def _sides(config: Config) -> dict[str, int]:
    """Widths of what a block's linears map between, by where they are found in config.json; empty where unknown."""
    config = config.get("text_config") or config
    width, heads = _first(config, _WIDTH), _first(config, _HEADS)
    if width is None:
        return {}
    usual = 4 * width if any(key in config for key in _INNER) else None  # of GPT-2, where n_inner is null
    sides = {"hidden_size": width, "intermediate_size": _first(config, _INNER) or usual}
    head = config.get("head_dim") or (width // heads if heads else None)
    if head and heads:
        sides["num_attention_heads x head size"] = heads * head
    if head and config.get("num_key_value_heads"):
        sides["num_key_value_heads x head size"] = config["num_key_value_heads"] * head
    return {name: size for name, size in sides.items() if size}


def _first(config: Config, keys: tuple[str, ...]) -> int | None:
    config = config.get("text_config") or config
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _refusal(key: str, value: Any, allowed: str) -> ApiqError:
    return ApiqError(f"{key} is {value}; it should be {allowed}.")
