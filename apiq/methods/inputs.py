"""What each linear of a block is fed, and in which order; in a mixture of experts some get few tokens, or none."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apiq import parallel
from apiq.blocks.activations import Activations, at_once, batches
from apiq.blocks.architecture import replace
from apiq.blocks.problem import Problem
from apiq.errors import ApiqError
from apiq.memory import in_parts


class Scattered:
    """What an expert is fed, (tokens, width), handed out like windows of `length` tokens; the last may be shorter."""

    def __init__(self, rows: Tensor, length: int, device: torch.device):
        self._parts = rows.split(length)
        self._device = device

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, batch: slice) -> Tensor:
        return torch.cat(self._parts[batch]).to(self._device)

    def weight(self, batch: slice) -> float:
        """How many tokens the windows of `batch` hold."""
        return float(sum(len(part) for part in self._parts[batch]))


Fed = Activations | Scattered
"""The input of a linear over all windows, (windows, length, width), or the tokens that an expert is fed."""


@contextlib.contextmanager
def counting(block: nn.Module, names: Iterable[str]) -> Iterator[dict[str, int]]:
    """The tokens that go into the submodules `names` of `block` within it; 0 for one that is never called."""
    counts = dict.fromkeys(names, 0)

    def count(name: str, fed: Tensor) -> None:
        counts[name] += _tokens(fed)

    with watching({name: block.get_submodule(name) for name in counts}, count):
        yield counts


def never_reached(counts: Mapping[str, int], device: torch.device) -> list[str]:
    """The names with a count of 0 in every process."""
    total = parallel.add(torch.tensor(list(counts.values()), device=device))
    return [name for name, tokens in zip(counts, total.tolist(), strict=True) if not tokens]


@torch.no_grad()
def input_order(problem: Problem, originals: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of the linears in the order in which the block calls them; those fed the same tensor stand together.

    As many windows are run as it takes until each was called; a linear that never is comes last. Experts are called in
    an order that depends on the windows: processes agree on that of the first, then what only the others call.
    """
    assert problem.X is not None
    order: list[list[str]] = []
    fed: list[Tensor] = []
    met: set[str] = set()

    def record(name: str, tensor: Tensor) -> None:
        if name in met:
            return
        met.add(name)
        for names, earlier in zip(order, fed, strict=True):
            if earlier is tensor:
                names.append(name)
                return
        order.append([name])
        fed.append(tensor)

    with watching(originals, record):
        for window in batches(len(problem.X), 1):
            problem.run(problem.X[window], window)
            if len(met) == len(originals):
                break
    order = _agreed(order)
    known = {name for names in order for name in names}
    return order + [[name] for name in originals if name not in known]


def _agreed(order: list[list[str]]) -> list[list[str]]:
    """The orders of all processes, one behind the other, each without what stands before it."""
    if parallel.size() == 1:
        return order
    orders: list[list[list[str]]] = [[] for _ in range(parallel.size())]
    dist.all_gather_object(orders, order)
    agreed: list[list[str]] = []
    known: set[str] = set()
    for names in itertools.chain.from_iterable(orders):
        agreed.append([name for name in names if name not in known])
        known.update(names)
    return [names for names in agreed if names]


@torch.no_grad()
def inputs(problem: Problem, hidden: Activations | None, linear: nn.Module) -> Fed | None:
    """What `linear` is fed when the block runs on `hidden`; None where it is fed nothing.

    Where every token is fed to it, the windows are kept as they are.

    Raises:
        ApiqError: some tokens are not, and several processes divide the windows.
    """
    assert hidden is not None
    count, length = hidden.rows.shape[:2]
    caught: list[Tensor] = []
    parts: list[Tensor] = []
    whole: list[Activations] = []

    def keep(batch: slice) -> None:
        caught.clear()
        problem.run(hidden[batch], batch)
        windows = hidden.rows[batch].shape[0]
        if not parts and sum(_tokens(fed) for fed in caught) == windows * length:
            fed = torch.cat(caught)
            if not whole:
                whole.append(Activations.empty((count, length, fed.shape[-1]), hidden.rows.dtype, hidden.home))
            whole[0][batch] = fed.view(windows, length, fed.shape[-1])
            return
        if whole:
            parts.append(whole.pop().rows[: batch.start].flatten(0, 1))
        parts.extend(fed.to(hidden.rows.device, hidden.rows.dtype) for fed in caught)

    with watching({"": linear}, lambda _, fed: caught.append(fed)):
        in_parts(count, at_once(hidden), keep, "a forward pass of a block")
    if whole:
        return whole[0]
    if parallel.size() > 1:
        raise ApiqError(
            "quantize.method is apiq-lw, which fits a mixture of experts in one process only; start it without "
            "torchrun, or take apiq-bw."
        )
    return Scattered(torch.cat(parts), length, hidden.device) if parts else None


def place(block: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module where its name says in the block."""
    for name, module in modules.items():
        replace(block, name, module)


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with the name and the input of each module before it is called."""

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    hooks = [module.register_forward_pre_hook(watcher(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(fed: Tensor) -> int:
    return fed.numel() // fed.shape[-1]
