"""What the linears of a block are fed, and in which order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apiq.blocks.activations import Activations, at_once, batches
from apiq.blocks.architecture import replace
from apiq.blocks.problem import Problem


@torch.no_grad()
def input_order(problem: Problem, originals: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of the linears in the order in which the block calls them; those fed the same tensor stand together.

    Linears that the first window does not reach, as experts may be, come last, one by one. The block is run with
    `originals` in place.
    """
    assert problem.X is not None
    order: list[list[str]] = []
    fed: list[Tensor] = []

    def recorder(name: str):
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for names, tensor in zip(order, fed, strict=True):
                if tensor is args[0]:
                    names.append(name)
                    return
            order.append([name])
            fed.append(args[0])

        return record

    current = {name: problem.block.get_submodule(name) for name in originals}
    place(problem.block, originals)
    hooks = [module.register_forward_pre_hook(recorder(name)) for name, module in originals.items()]
    try:
        problem.run(problem.X[slice(0, 1)], slice(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
        place(problem.block, current)
    called = {name for names in order for name in names}
    return order + [[name] for name in originals if name not in called]


@torch.no_grad()
def inputs(problem: Problem, hidden: Activations | None, linear: nn.Module, batch_size: int) -> Activations:
    """What `linear` is fed when the block runs on `hidden`."""
    assert hidden is not None
    caught: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    result: Activations | None = None
    try:
        for batch in batches(len(hidden), at_once(hidden, batch_size)):
            problem.run(hidden[batch], batch)
            fed = caught.pop()
            if result is None:
                shape = (len(hidden), *fed.shape[1:])
                result = Activations.empty(shape, hidden.rows.dtype, hidden.home)
            result[batch] = fed
    finally:
        hook.remove()
    assert result is not None
    return result


def place(block: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module where its name says in the block."""
    for name, module in modules.items():
        replace(block, name, module)
