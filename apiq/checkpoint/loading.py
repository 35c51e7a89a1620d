"""Any model folder as a model: full precision, quantized or finetuned, whole or refused."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from apiq.allocator import give_back_freed
from apiq.blocks.stream import ModelStream
from apiq.checkpoint import manifest, skipped
from apiq.checkpoint.adapter_file import PACKED, adapter_file, read_adapter, write_adapter_file
from apiq.checkpoint.base import base_of
from apiq.checkpoint.fetching import fetched
from apiq.checkpoint.spreading import forget_with, spread
from apiq.device import pick_device, pick_dtype
from apiq.errors import ApiqError
from apiq.layers.dense import LIMIT
from apiq.layers.embedding import keep_narrow
from apiq.layers.packed import PackedLinear, asked_once
from apiq.models.config import read_config
from apiq.models.precision import stored_dtype

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "spiece*", "merges.txt")
"""Files by which a folder with a tokenizer is known."""
MISSING = "Found missing adapter keys"
"""How PEFT begins to warn of an adapter that lacks tensors."""


@dataclass
class FullPrecision:
    """An unquantized model on disk."""

    stream: ModelStream
    tokenizer: Any
    """None where the folder has no tokenizer."""
    folder: Path
    dtype: torch.dtype
    """The precision in which its weights are stored."""


@dataclass
class Loaded:
    """A model ready to run."""

    model: Any
    folder: Path
    """The folder with config.json that the base was read from."""
    kind: str
    """full, quantized or finetuned."""

    own_tokenizer: Any = None
    """None where the folder has none."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            ApiqError: the folder has none.
        """
        return self.own_tokenizer or read_tokenizer(self.folder)


def full_precision(source: str | Path, dtype: torch.dtype | None = None) -> FullPrecision:
    """Open an unquantized model, to be streamed in `dtype` or in the precision in which it is stored.

    Raises:
        ApiqError: there is no such model, it is quantized already, or its files are damaged.
    """
    from apiq.models.source import locate, weight_files

    folder = locate(source)
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise ApiqError(f"{source} is quantized already; give the full-precision model.")
    files = [folder / name for name in weight_files(folder)]
    stored = stored_dtype(files, config)
    stream = ModelStream(folder, config, dtype or stored, files)
    tokenizer = read_tokenizer(folder) if _has_tokenizer(folder) else None
    return FullPrecision(stream, tokenizer, folder, stored)


def load(
    source: str | Path,
    *,
    adapters: bool = True,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trainable: bool = False,
) -> Loaded:
    """Read the model in `source`, a folder of any kind or the name of a hub repository, for use.

    A finetuned folder is read with its base; adapters in a folder are put on unless `adapters` is false.
    `trainable` leaves the adapters open to training, and the embedding in as few bits as it was stored in.

    Raises:
        ApiqError: a file is missing, damaged or half-written, the folder is no model, or `dtype` or `device` is none.
    """
    place = pick_device(device)
    precision = pick_dtype(dtype, place)
    folder = Path(source) if Path(source).is_dir() else fetched(str(source))
    facts = manifest.read(folder)
    kind = "full" if facts is None else facts["kind"]
    base, adapter = folder, folder / "adapter"
    if kind == skipped.KIND:
        raise ApiqError(f"{folder} holds no model: finetune.task was none; load the quantized folder instead.")
    if facts is not None:
        manifest.verify(folder)
    if kind == "finetuned":
        assert facts is not None
        base = base_of(folder, facts)
    if kind == "full":
        from apiq.models.source import locate

        base = locate(folder)
        adapter = base / "adapter"
    config = read_config(base)
    if kind == "full" and (quantized := getattr(config, "quantization_config", None)):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized.quant_method
        if method != "apiq":
            raise ApiqError(
                f"{source} is in the format of {method}; apiq reads its own folders, load it with that library."
            )
        raise ApiqError(f"{source} is half a checkpoint: its config.json is quantized, but it has no {manifest.NAME}.")
    placed = _placed(base, config, precision, place) if kind == "full" and not trainable else {}
    model = _from_pretrained(base, config, precision, place, placed)
    if place.type == "cpu" and _is_large(model):
        give_back_freed()
    if trainable:
        keep_narrow(model)
    if adapters and adapter.is_dir():
        model = _adapted(model, adapter, trainable)
    model.train(trainable)
    return Loaded(model, base, kind, read_tokenizer(base) if _has_tokenizer(base) else None)


def _placed(folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How a model larger than `device` is placed; nothing for one that fits."""
    from apiq.models.source import weight_files

    files = [folder / name for name in weight_files(folder)]
    return spread(files, stored_dtype(files, config), dtype, device)


def _from_pretrained(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, placed: dict[str, Any]
) -> nn.Module:
    name = (config.architectures or [""])[0]
    family: Any = getattr(transformers, name, AutoModelForCausalLM)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = family.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
            ignore_mismatched_sizes=True, **placed,
        )  # fmt: skip
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ApiqError(f"the weights in {folder} cannot be read: {' '.join(str(error).split())}.") from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        raise ApiqError(f"{folder} has no weights, or none of the right shape, for {wrong[0]} ({len(wrong)} in all).")
    if placed:
        forget_with(model, placed["offload_folder"])
        return model
    return model.to(device)


def _is_large(model: nn.Module) -> bool:
    """Whether the memory that dequantized weights leave behind matters more than the time that giving it back takes."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(linear.in_features * linear.out_features for linear in packed) > LIMIT


def _adapted(model: nn.Module, adapter: Path, trainable: bool) -> nn.Module:
    from peft import PeftModel

    import apiq.adapters.houlsby  # noqa: F401 (registers the adapter that PEFT lacks)

    with asked_once(), warnings.catch_warnings():
        # peft 0.21 itself asks transformers 5 for a property by its old name
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        warnings.filterwarnings("error", MISSING, UserWarning)
        try:
            if adapter_file(adapter) != adapter / PACKED:
                return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
            with tempfile.TemporaryDirectory() as folder:  # PEFT reads adapters from a folder only
                shutil.copy2(adapter / "adapter_config.json", folder)
                write_adapter_file(Path(folder), read_adapter(adapter))
                return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        except UserWarning as warning:
            first = str(warning).partition("'")[2].partition("'")[0]
            raise ApiqError(f"{adapter} is the adapter of another model: it has no {first}.") from None


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZERS)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ApiqError: there is none that can be read.
    """
    try:
        if not _has_tokenizer(folder):
            raise OSError("it has no file of one")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(f"{folder} has no tokenizer that can be read: {reason}.") from None
