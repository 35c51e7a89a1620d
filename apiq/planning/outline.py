"""A model without its weights: config.json alone gives every shape, on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from apiq.blocks.architecture import Blocks, find_blocks
from apiq.errors import ApiqError
from apiq.models import manifest
from apiq.models.demo import demo_config
from apiq.params import ModelParams

PROBE_VOCABULARY = 16
"""Rows of the embeddings of a skeleton."""


@dataclass(frozen=True)
class Outline:
    """The shapes of a model, all of its tensors on the meta device."""

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
        names = {name for name, _ in self.model.named_parameters()} | {name for name, _ in self.model.named_buffers()}
        state = self.model.state_dict(keep_vars=True)
        prefix = f"{self.blocks.path}."
        return {name: value for name, value in state.items() if name in names and not name.startswith(prefix)}

    def parameters(self) -> int:
        """Number of parameters; tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def outline(model: ModelParams) -> Outline:
    """The shapes of the model that `model` names; no weight is read or fetched.

    Raises:
        ApiqError: there is no config.json to be had, or transformers cannot make a model of it.
    """
    config, folder = read_config(model)
    if getattr(config, "quantization_config", None):
        raise ApiqError(f"{model.source} is quantized already; plan with the full-precision model.")
    with torch.device("meta"):
        made = build(config)
    return Outline(config, made, find_blocks(made), _storage(config), _tokenizer_bytes(folder))


def build(config: PretrainedConfig) -> Any:
    """The model of `config` with whatever weights the surrounding context gives.

    Raises:
        ApiqError: transformers knows no language model of this kind.
    """
    name = (config.architectures or [""])[0]
    family: Any = getattr(transformers, name, None)
    try:
        return AutoModelForCausalLM.from_config(config) if family is None else family(config)
    except (ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(f"no model can be made of this config.json ({config.model_type}): {reason}.") from None


def skeleton(config: PretrainedConfig) -> tuple[Any, Blocks]:
    """The model with all blocks on the meta device and the rest in memory, random, with a tiny vocabulary.

    Enough for `apiq.blocks.capture` to learn the arguments of every block, whatever the size of the model.
    """
    with init_empty_weights():
        model = build(config)
    blocks = find_blocks(model)
    embeddings = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding(PROBE_VOCABULARY, embeddings.embedding_dim))
    head = model.get_output_embeddings()
    kept = set() if head is None else {id(parameter) for parameter in head.parameters()}
    for name, module in model.named_modules():
        if not f"{name}.".startswith(f"{blocks.path}."):
            for own, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device.type == "meta" and id(parameter) not in kept:
                    setattr(module, own, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
    return model, blocks


def read_config(model: ModelParams) -> tuple[PretrainedConfig, Path | None]:
    """The configuration of a model and the folder that it lies in; the demo model has none.

    Raises:
        ApiqError: there is no such folder, repository or network, or the file cannot be read.
    """
    if model.source == "demo":
        return demo_config(model.demo), None
    folder = _folder(model.source, model.revision)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True), folder
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(f"{folder / 'config.json'} cannot be read: {reason}.") from None


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


def _storage(config: PretrainedConfig) -> torch.dtype:
    declared = getattr(config, "dtype", None)
    return (getattr(torch, declared) if isinstance(declared, str) else declared) or torch.float32


def _tokenizer_bytes(folder: Path | None) -> int | None:
    names: Iterable[str] = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
                            "vocab.txt", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
    sizes = [(folder / name).stat().st_size for name in names if (folder / name).is_file()] if folder else []
    return sum(sizes) if sizes else None
