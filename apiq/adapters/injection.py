"""The adapters of one block, put on, read and set through PEFT, and their names in the whole model."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from apiq.adapters.configuration import NO_RANKS, block_config, refused
from apiq.adapters.targets import Shapes
from apiq.adapters.tuners import TUNERS, Tuner
from apiq.layers.packed import asked_once
from apiq.params import QuantizeParams

IN_BLOCK = "base_model.model."
"""What PEFT puts before the name of a parameter that stands in the model."""
SHARED = "base_model."
"""What it puts before the name of one that all layers share, as `vera_A`."""


class Adapters:
    """A PEFT tuner on the linears of one block, which it changes in place.

    Names are those of the state dict that PEFT saves: `self_attn.q_proj.lora_A.weight` in the block, and
    `base_model.vera_A` for what the layers share.
    """

    def __init__(self, block: nn.Module, params: QuantizeParams, linears: Shapes, seed: int, start: bool = False,
                 ranks: Mapping[str, int] = NO_RANKS):  # fmt: skip
        """Put adapters on those of `linears`, the linears of `block` by their shapes, that `params` asks for.

        With `start` they are about to be fitted, otherwise about to be loaded. Parts that all blocks share are
        made from `quantize.seed`, the rest from `seed`. `ranks` are those of the linears that have one of their own.

        Raises:
            ApiqError: the tuner cannot act on these linears.
        """
        self.tuner = TUNERS[params.adapter]
        config = block_config(params, linears, start, ranks)
        with _seeded(block, params.seed if self.tuner.shared else seed), _placed(block), _quiet(), asked_once():
            try:
                self._model = peft.get_peft_model(block, config)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise refused(params, error) from None
        del block.peft_config
        self._model.eval()
        if self.tuner.shared:
            for name, parameter in self._model.named_parameters(remove_duplicate=False):
                if not name.startswith(IN_BLOCK):
                    parameter.requires_grad_(False)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        if start:
            for parameter in trained:
                parameter.data = parameter.data.float()
        self._trained = {id(parameter): decays(parameter) for parameter in trained}

    def trained(self, inside: nn.Module, decaying: bool) -> list[nn.Parameter]:
        """The parameters to be trained, float32, of the adapters inside a module: the block or a linear in it.

        Either those on which weight decay makes sense (`decays`) or the others.
        """
        return [parameter for parameter in inside.parameters() if self._trained.get(id(parameter)) is decaying]

    def state(self) -> dict[str, Tensor]:
        """All tensors of the adapters by name."""
        found = peft.get_peft_model_state_dict(self._model, save_embedding_layers=False)
        return {name.removeprefix(IN_BLOCK): value.detach() for name, value in found.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapters.

        Raises:
            KeyError: `state` and the block do not carry the same adapters.
        """
        own = self.state().keys()
        if own != state.keys():
            raise KeyError(f"adapters differ: {sorted(own ^ state.keys())}")
        named = {name if name.startswith(SHARED) else IN_BLOCK + name: value for name, value in state.items()}
        unknown = peft.set_peft_model_state_dict(self._model, named).unexpected_keys
        if unknown:
            raise KeyError(f"PEFT does not know the adapter tensors {sorted(unknown)}")


def ranks_of(adapters: Mapping[str, Tensor], params: QuantizeParams) -> dict[str, int]:
    """The ranks of LoRA by linear, from its tensors by their names; empty where all have `quantize.rank`."""
    end = ".lora_A.weight"
    if not params.candidate_ranks:
        return {}
    return {name.removeprefix(IN_BLOCK).removesuffix(end): len(A) for name, A in adapters.items() if name.endswith(end)}


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapters inside a module, by PEFT's names there."""
    return {
        f"{name}.{key}".lstrip("."): parameter
        for name, carrier in module.named_modules()
        if isinstance(carrier, BaseTunerLayer) and isinstance(carrier, nn.Module)
        for key, parameter in carrier.named_parameters()
        if not key.startswith("base_layer.")
    }


def decays(parameter: Tensor) -> bool:
    """Whether weight decay, which pulls towards 0, leads this parameter towards no adapter, judged at its start.

    It does for matrices that start at 0 or at random, as A and B. It does not for vectors (a magnitude, a
    bias) and for what starts as one constant: a scale that is neutral at 1.
    """
    if parameter.is_meta:
        return parameter.dim() > 1  # it has no start, and nothing is fitted there
    constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
    return parameter.dim() > 1 and not (constant and bool(parameter.any()))


def model_state(path: str, blocks: list[dict[str, Tensor]], tuner: Tuner) -> dict[str, Tensor]:
    """The adapters of all blocks of the list `path` under the names with which PEFT saves them.

    Raises:
        ValueError: a part that all blocks share is not the same in two of them.
    """
    state: dict[str, Tensor] = {}
    counted = 0
    for index, adapters in enumerate(blocks):
        numbered = [name for name in adapters if tuner.numbered and name.startswith(tuner.numbered)]
        for name, value in adapters.items():
            key = name if name.startswith(SHARED) else f"{IN_BLOCK}{path}.{index}.{name}"
            if name in numbered:
                key = f"{tuner.numbered}{counted + int(name.removeprefix(tuner.numbered))}"
            if key in state and not (value.is_meta or torch.equal(state[key], value)):
                raise ValueError(f"the blocks cannot share {key}: it is another one in block {index} than before")
            state[key] = value
        counted += len(numbered)
    return state


@contextlib.contextmanager
def _placed(block: nn.Module) -> Iterator[None]:
    """Tell PEFT the device of the block, which it would take from a parameter: OLMo's blocks keep none but weights."""
    block.hf_device_map = {"": next(itertools.chain(block.parameters(), block.buffers())).device}  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del block.hf_device_map


@contextlib.contextmanager
def _seeded(block: nn.Module, seed: int) -> Iterator[None]:
    """Seed torch without touching its state outside; no gradients."""
    devices = sorted({p.device.index for p in block.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings, which speak of whole models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
