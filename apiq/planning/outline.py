"""A model without its weights: config.json alone gives every shape, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from apiq.blocks.activations import Home
from apiq.blocks.architecture import Blocks, find_blocks, text_model
from apiq.blocks.capture import BlockCall, capture
from apiq.blocks.stream import skeleton
from apiq.blocks.unfuse import require_covered, unfuse
from apiq.errors import ApiqError
from apiq.models import config as configs
from apiq.models import manifest
from apiq.models.demo import demo_config
from apiq.models.precision import declared_dtype, stored_dtype
from apiq.models.source import weight_files
from apiq.params import ModelParams

PROBE_VOCABULARY = 16
"""Rows of the embeddings of a skeleton."""


@dataclass(frozen=True)
class Outline:
    """The shapes of a model, its weights on the meta device, its blocks unfused."""

    config: PretrainedConfig
    model: Any
    blocks: Blocks
    storage: torch.dtype
    """The precision in which the weights are stored."""
    tokenizer_bytes: int | None
    """Size of the tokenizer's files; None where they are not at hand."""

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def context(self) -> int | None:
        """The longest sequence, in tokens, if the model has a bound."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def kinds(self) -> list[tuple[nn.Module, list[int]]]:
        """The blocks that differ in shape, each with the numbers of all blocks like it."""
        found: dict[tuple, tuple[nn.Module, list[int]]] = {}
        for index, block in enumerate(self.blocks.modules):
            shape = tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())
            found.setdefault(shape, (block, []))[1].append(index)
        return list(found.values())

    def outside(self) -> dict[str, torch.Tensor]:
        """The parameters and stored buffers outside the blocks by name; tied ones once."""
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if not name.startswith(f"{self.blocks.path}."):
                found.setdefault(id(value), (name, value))
        return dict(found.values())

    def parameters(self) -> int:
        """Number of parameters; tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def outline(model: ModelParams) -> Outline:
    """The shapes of the model that `model` names; no weight is read or fetched.

    Raises:
        ApiqError: there is no config.json to be had, transformers cannot make a model of it, or much of a block lies in
            tensors that are no linears.
    """
    config, folder = read_config(model)
    if getattr(config, "quantization_config", None):
        raise ApiqError(f"{model.source} is quantized already; plan with the full-precision model.")
    storage = _storage(folder, config)
    made = skeleton(copy.deepcopy(config), storage)
    blocks = find_blocks(made)
    for index, block in enumerate(blocks.modules):
        require_covered(unfuse(block), f"{blocks.path}.{index}")
    return Outline(config, made, blocks, storage, _tokenizer_bytes(folder))


def probe(config: PretrainedConfig) -> tuple[Any, Blocks]:
    """The model with all blocks on the meta device and the rest in memory, all ones, with a tiny vocabulary.

    Enough for `apiq.blocks.capture` to learn the arguments of every block, whatever the size of the model.
    """
    model: Any = skeleton(copy.deepcopy(config), torch.float32)
    blocks, embeddings = find_blocks(model), model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding(PROBE_VOCABULARY, embeddings.embedding_dim))
    text = text_model(model)
    for name, module in model.named_modules():
        if module in set(text.modules()) and not f"{name}.".startswith(f"{blocks.path}."):
            for own, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device.type == "meta":
                    setattr(module, own, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
            for own, buffer in list(module.named_buffers(recurse=False)):
                if buffer.device.type == "meta":
                    setattr(module, own, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model, blocks


def block_calls(model: Any, blocks: Blocks, length: int, device: torch.device) -> list[BlockCall]:
    """The arguments of the blocks of a `probe` for windows of `length` tokens."""
    window = torch.zeros(1, length, dtype=torch.long)
    return capture(model, blocks.modules, window, torch.float32, lambda shape: Home("device", device))[1]


def read_config(model: ModelParams) -> tuple[PretrainedConfig, Path | None]:
    """The configuration of a model and the folder that it lies in; the demo model has none.

    Raises:
        ApiqError: there is no such folder, repository or network, or the file cannot be read.
    """
    if model.source == "demo":
        return demo_config(model.demo), None
    folder = _folder(model.source, model.revision)
    return configs.read_config(folder), folder


def _folder(source: str, revision: str | None) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        name, _, given = source.partition("@")
        return _from_hub(name, given or revision)
    facts = None if (folder / "config.json").is_file() else manifest.read(folder)
    if facts is not None and facts["kind"] == "hub":
        return _from_hub(facts["repository"], facts["commit"])
    if facts is not None and facts["kind"] == "local":
        folder = Path(facts["path"])
    if not (folder / "config.json").is_file():
        raise ApiqError(f"the folder {folder} has no config.json to plan from.")
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except errors.GatedRepoError:
        raise ApiqError(f"{name} is gated: accept its licence on its page, then `hf auth login`.") from None
    except errors.RevisionNotFoundError:
        raise ApiqError(f"{name} has no revision {revision} on the Hugging Face hub.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ApiqError(f"there is no model folder {name}, and no such repository on the Hugging Face hub.") from None
    except (OSError, ValueError):
        raise ApiqError(
            f"config.json of {name} is neither in the cache nor to be had from the Hugging Face hub now; "
            "connect, or give --model a folder that holds this config.json."
        ) from None


def _storage(folder: Path | None, config: PretrainedConfig) -> torch.dtype:
    """That of the weights where they are at hand, else what config.json declares."""
    try:
        files = [] if folder is None else [folder / name for name in weight_files(folder)]
        return stored_dtype((path for path in files if path.exists()), config)
    except (ApiqError, SafetensorError):
        return declared_dtype(config)


def _tokenizer_bytes(folder: Path | None) -> int | None:
    names: Iterable[str] = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
                            "vocab.txt", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
    sizes = [(folder / name).stat().st_size for name in names if (folder / name).is_file()] if folder else []
    return sum(sizes) if sizes else None
