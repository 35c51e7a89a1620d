"""A transformers model whose weights stay on disk: part by part they come into memory, and go again."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import meta_device_safe_creation_ops, no_tie_weights
from transformers.modeling_utils import LoadStateDictConfig, local_torch_dtype
from transformers.utils import logging as transformers_logging

from apiq.blocks.architecture import Blocks, find_blocks, text_model
from apiq.errors import ApiqError

CPU = torch.device("cpu")
ROWS = 1024
"""Rows of two tensors that are compared at a time."""


class ModelStream:
    """The skeleton of the model in a folder, on the meta device, and where on disk each of its tensors is.

    Names and layouts of checkpoints that differ from those of the model (experts stored one by one,
    renamed prefixes) go through the conversions of transformers, as in `from_pretrained`.
    """

    model: PreTrainedModel
    blocks: Blocks

    def __init__(self, folder: Path, config: PretrainedConfig, dtype: torch.dtype, files: list[Path]):
        """Build the skeleton in `dtype` and check it against the headers of the safetensors `files`.

        Raises:
            ApiqError: a tensor of the model is in none of the files or has another shape, a file is
                damaged, or no blocks are found.
        """
        self.folder, self.dtype = folder, dtype
        self.model = skeleton(config, dtype)
        self.blocks = find_blocks(self.model)
        self._conversions = get_model_conversion_mapping(self.model)
        self._files = _tensor_files(files)
        self._targets = self._renamed()
        self._read_as: dict[str, str] = {}
        self._follow_ties()
        self._require_complete()

    def load_block(self, index: int, device: torch.device) -> nn.Module:
        """Block `index` with its weights, on `device`, in evaluation mode.

        It has the config of the model where it has none of its own: PEFT asks for it before it puts adapters on.
        """
        prefix, empty = f"{self.blocks.path}.{index}.", copy.deepcopy(self.blocks.modules[index])
        self._load(lambda name: name.startswith(prefix), device)
        block = self.blocks.modules[index]
        self.blocks.modules[index] = empty  # the skeleton stays as it is, the block is the caller's
        self._require_loaded(block, prefix)
        if not hasattr(block, "config"):
            block.config = self.model.config  # pyright: ignore[reportArgumentType] (not a module)
        return block.eval()

    @contextlib.contextmanager
    def embeddings(self, device: torch.device) -> Iterator[PreTrainedModel]:
        """The model with everything of its text part that lies outside the blocks on `device`, for the block."""
        text = text_model(self.model)
        outer = next(name for name, module in self.model.named_modules() if module is text)
        within, blocks = f"{outer}." if outer else "", f"{self.blocks.path}."
        with self._borrowed(lambda name: name.startswith(within) and not name.startswith(blocks), device):
            yield self.model

    @contextlib.contextmanager
    def rest(self, device: torch.device = CPU) -> Iterator[PreTrainedModel]:
        """The model with everything that lies outside the blocks on `device`, for the block."""
        blocks = f"{self.blocks.path}."
        with self._borrowed(lambda name: not name.startswith(blocks), device):
            yield self.model

    @contextlib.contextmanager
    def _borrowed(self, wanted: Callable[[str], bool], device: torch.device) -> Iterator[None]:
        self._load(wanted, device)
        self.model.tie_weights()
        try:
            yield
        finally:
            for name, parameter in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if name in self._loadable and wanted(name):
                    _set(self.model, name, torch.empty_like(parameter, device="meta"))
            self.model.tie_weights()

    def _load(self, wanted: Callable[[str], bool], device: torch.device) -> None:
        keys = [key for key, target in self._targets.items() if wanted(target)]
        files = sorted({self._files[key] for key in keys})
        try:
            with contextlib.ExitStack() as stack:
                opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in files}
                tensors = {key: opened[self._files[key]].get_slice(self._read_as.get(key, key)) for key in keys}
                self._convert(tensors, device)
        except SafetensorError as error:
            raise ApiqError(f"the weights in {self.folder} cannot be read: {' '.join(str(error).split())}.") from None

    def _convert(self, tensors: dict[str, Any], device: torch.device) -> Any:
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._conversions,  # pyright: ignore[reportArgumentType] (declared too narrowly)
        )
        with _quiet():
            return convert_and_load_state_dict_in_model(self.model, tensors, config)[0]

    def _renamed(self) -> dict[str, str]:
        """The name in the model for each name on disk."""
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        own, prefix = self.model.state_dict(), self.model.base_model_prefix
        targets = {}
        for key in self._files:
            name, _ = rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name = key
            targets[key] = name
        return targets

    def _follow_ties(self) -> None:
        """Read a tensor that the files hold only under the name of one tied to it.

        Raises:
            ApiqError: they hold both, and those differ.
        """
        held = {target: key for key, target in self._targets.items()}
        for tied, source in self.model.all_tied_weights_keys.items():
            key = held.get(tied)
            if key is None:
                continue
            if source not in held:
                self._files[source], self._read_as[source] = self._files.pop(key), key
                self._targets[source] = held[source] = source
                del self._targets[key]
            elif not self._equal(key, held[source]):
                raise ApiqError(
                    f"{key} in {self.folder} differs from {held[source]}, to which config.json ties it; set "
                    "tie_word_embeddings to false in config.json."
                )

    def _equal(self, *keys: str) -> bool:
        """Whether two tensors of the files are the same, compared a few rows at a time."""
        with contextlib.ExitStack() as stack:
            files = (stack.enter_context(safe_open(self._files[key], framework="pt")) for key in keys)
            one, other = (file.get_slice(self._read_as.get(key, key)) for file, key in zip(files, keys, strict=True))
            if one.get_shape() != other.get_shape() or one.get_dtype() != other.get_dtype():
                return False
            starts = range(0, one.get_shape()[0], ROWS)
            return all(torch.equal(one[start : start + ROWS], other[start : start + ROWS]) for start in starts)

    def _require_complete(self) -> None:
        """Load the headers only, on the meta device, and see what is left out."""
        shapes = {}
        for path in sorted(set(self._files.values())):
            with safe_open(path, framework="pt") as file:
                for key in (key for key, place in self._files.items() if place == path):
                    shape = file.get_slice(self._read_as.get(key, key)).get_shape()
                    shapes[key] = torch.empty(shape, dtype=self.dtype, device="meta")
        report = self._convert(shapes, torch.device("meta"))
        self.model._adjust_missing_and_unexpected_keys(report)
        wrong = sorted(report.missing_keys - self.model.all_tied_weights_keys.keys())
        wrong += sorted(key for key, *_ in report.mismatched_keys)
        if wrong:
            raise ApiqError(
                f"{self.folder} has no weights, or none of the right shape, for {wrong[0]} ({len(wrong)} in all)."
            )
        self._loadable = set(self.model.state_dict())

    def _require_loaded(self, module: nn.Module, prefix: str) -> None:
        for name, value in module.state_dict().items():
            if value.device.type == "meta":
                raise ApiqError(f"{self.folder} has no weights for {prefix}{name}.")


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `config` describes, on the meta device but for the buffers that no checkpoint holds.

    Raises:
        ApiqError: transformers has no model for it.
    """
    name = (config.architectures or [""])[0]
    family: Any = getattr(transformers, name, None)
    contexts = (local_torch_dtype(dtype), no_tie_weights(), torch.device("meta"), meta_device_safe_creation_ops())
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        try:
            model = AutoModelForCausalLM.from_config(config) if family is None else family(config)
        except (ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
            raise ApiqError(f"no model can be made of this config.json ({config.model_type}): {reason}.") from None
    for value in model.state_dict(keep_vars=True).values():
        value._is_hf_initialized = True
    for key, buffer in list(model.named_non_persistent_buffers()):
        _set(model, key, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()  # these buffers only: everything else counts as initialized
    model.tie_weights()
    return model.eval()


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if child in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, child, value)


def _tensor_files(files: list[Path]) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                places.update(dict.fromkeys(tensors.keys(), path))
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise ApiqError(f"{path} is damaged or cut off: {' '.join(str(error).split())}.") from None
    return places


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
