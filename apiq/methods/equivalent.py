"""Equivalent transformations: channels made larger for the linears that read them, smaller where they are written.

With c > 0 per channel, a norm (or linear) that writes x / c and linears that read it with the columns W c
compute what they computed before. What can take such a factor is found out from the block itself: it is tried,
with factors that floating-point numbers carry without rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from apiq.blocks.architecture import replace
from apiq.blocks.problem import Problem
from apiq.blocks.unfuse import Experts
from apiq.methods.inputs import input_order

EXACT = 1e-5
"""Relative change of the block's output up to which a trial counts as no change."""


@dataclass(frozen=True)
class Pair:
    """Linears that read one tensor, and the module that writes it."""

    readers: tuple[str, ...]
    writer: str
    kind: Literal["norm", "shifted norm", "linear"]
    """What is divided besides a bias: a norm's weight, 1 + weight of a shifted one (Gemma's), the rows of a linear."""


@torch.no_grad()
def pairs(problem: Problem) -> list[Pair]:
    """The pairs of a block whose transformation changes nothing in its output, readers in the order of their calls.

    A norm is tried for the linears that get its very output, a linear for those called after it that are as wide as
    its output. Linears whose input is written by none of them (or is read by something else too) have no pair; so have
    those behind a shifted norm in half precision, where 1 + weight cannot be divided without rounding. What the first
    window does not reach is not tried, since nothing would change, nor are experts, whose input has many readers.
    """
    linears = problem.linears()
    order = input_order(problem, linears)
    norms = _norms(problem, order, linears)
    experts = tuple(f"{name}." for name, module in problem.block.named_modules() if isinstance(module, Experts))
    tried = [names for names in order if names[0] in norms and not names[0].startswith(experts)]
    found = []
    for place, readers in enumerate(tried):
        width = linears[readers[0]].in_features
        earlier = [name for names in tried[:place] for name in names if linears[name].out_features == width]
        candidates = [Pair(tuple(readers), name, kind) for name in norms.get(readers[0], []) for kind in _KINDS]
        candidates += [Pair(tuple(readers), name, "linear") for name in reversed(earlier)]
        found += next(([pair] for pair in candidates if _changes_nothing(problem, pair)), [])
    return found


def transformed(block: nn.Module, pair: Pair, c: Tensor) -> dict[str, Tensor]:
    """The tensors of the block that the factors c (channels) change, as they become, by name, in their dtypes."""
    writer = block.get_submodule(pair.writer)
    weight = writer.get_parameter("weight").float()
    if pair.kind == "linear":
        divided = weight / c.unsqueeze(-1)
    else:
        divided = weight / c if pair.kind == "norm" else (1 + weight) / c - 1
    result = {f"{pair.writer}.weight": divided}
    if getattr(writer, "bias", None) is not None:
        result[f"{pair.writer}.bias"] = writer.get_parameter("bias").float() / c
    for name in pair.readers:
        result[f"{name}.weight"] = block.get_submodule(name).get_parameter("weight").float() * c
    return {name: value.to(block.get_parameter(name).dtype) for name, value in result.items()}


def put(block: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the named parameters of the block new values, in new memory; return the old ones."""
    old = {name: block.get_parameter(name).detach() for name in tensors}
    for name, value in tensors.items():
        replace(block, name, nn.Parameter(value, requires_grad=False))
    return old


_KINDS: tuple[Literal["norm", "shifted norm"], ...] = ("norm", "shifted norm")


def _changes_nothing(problem: Problem, pair: Pair) -> bool:
    """Whether the block's output for the first window stays when channels are scaled by 1/2, 1 and 2."""
    assert problem.X is not None
    first = slice(0, 1)
    before = problem.run(problem.X[first], first)
    readers = problem.block.get_submodule(pair.readers[0])
    assert isinstance(readers, nn.Linear)
    powers = torch.arange(readers.in_features, device=before.device) % 3 - 1
    old = put(problem.block, transformed(problem.block, pair, 2.0**powers))
    try:
        after = problem.run(problem.X[first], first)
    finally:
        put(problem.block, old)
    return bool((after - before).norm() <= EXACT * before.norm())


def _norms(problem: Problem, order: list[list[str]], linears: Mapping[str, nn.Linear]) -> dict[str, list[str]]:
    """By first reader that the first window reaches, the modules with a weight a channel whose very output it gets."""
    assert problem.X is not None
    written: list[tuple[str, Tensor]] = []
    norms: dict[str, list[str]] = {}

    def wrote(name: str):
        return lambda module, args, output: written.append((name, output))

    def read(name: str):
        return lambda module, args: norms.update({name: [each for each, tensor in written if tensor is args[0]]})

    found = {name: module for name, module in problem.block.named_modules() if _is_norm(module)}
    hooks = [module.register_forward_hook(wrote(name)) for name, module in found.items()]
    hooks += [linears[names[0]].register_forward_pre_hook(read(names[0])) for names in order]
    try:
        problem.run(problem.X[slice(0, 1)], slice(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return norms


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1
