"""Where the transformer blocks of a model and their linears are, found from the model itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from apiq.errors import ApiqError


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model and the name of the list that holds them, as in `model.layers`."""

    path: str
    modules: nn.ModuleList


def find_blocks(model: nn.Module) -> Blocks:
    """The nn.ModuleList of modules of one class that holds the most weights in linears.

    Raises:
        ApiqError: no such list is in the model.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: _linear_weights(module) for name, module in lists.items() if len({type(m) for m in module}) == 1}
    path = max(sizes, key=lambda name: sizes[name], default="")
    if not path or not sizes[path]:
        raise ApiqError(
            f"no transformer blocks were found in {type(model).__name__}: looked for an nn.ModuleList of modules of "
            f"one class with nn.Linear inside, found the lists {', '.join(lists) or 'none'}."
        )
    return Blocks(path, lists[path])


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by their name inside it, as in `self_attn.q_proj`."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def replace(block: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule `name` of `block` was."""
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)


def _linear_weights(blocks: nn.ModuleList) -> int:
    return sum(module.weight.numel() for module in blocks.modules() if isinstance(module, nn.Linear))
