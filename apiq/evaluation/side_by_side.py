"""A block in full precision and quantized, run on the same windows, every linear compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from apiq.blocks.activations import Activations, batches
from apiq.blocks.capture import BlockCall
from apiq.blocks.unfuse import Experts

BLOCK = "block"
"""Stands in the place of a linear's name for the block as a whole."""


@dataclass
class Totals:
    """Sums over tokens of Euclidean norms: of the output for one token, and of what it is off."""

    norm: float = 0.0
    own: float = 0.0
    """Off in the quantized block on the full-precision input."""
    accumulated: float = 0.0
    """Off in the quantized block on the input from the quantized blocks before."""

    def add(self, target: Tensor, own: Tensor, accumulated: Tensor) -> None:
        """Count outputs (..., width) of some more tokens."""
        target = target.float()
        self.norm += _norms(target)
        self.own += _norms(target - own.float())
        self.accumulated += _norms(target - accumulated.float())


@dataclass
class SideBySide:
    """A full-precision block (`unfuse`d) and its quantized counterpart with adapters on."""

    block: nn.Module
    quantized: nn.Module
    call: BlockCall
    names: Sequence[str]
    """The linears to compare, by name in both."""
    totals: dict[str, Totals] = field(default_factory=dict)
    """By name of the linear, and of BLOCK. Experts are not in it: each model sends other tokens to them."""
    tokens: int = 0

    def propagate(self, X: Activations, Xq: Activations, batch_size: int) -> tuple[Activations, Activations]:
        """Count all outputs for the inputs X and Xq (windows, length, width) of the block in either model.

        Returns:
            The output of the full-precision block for X, and of the quantized one for Xq.
        """
        routed = tuple(f"{name}." for name, module in self.block.named_modules() if isinstance(module, Experts))
        names = [name for name in self.names if not name.startswith(routed)]
        Y, Yq = X.like(), Xq.like()
        for batch in batches(len(X), batch_size):
            target = self._outputs(self.block, names, X[batch], batch)
            own = self._outputs(self.quantized, names, X[batch], batch)
            accumulated = self._outputs(self.quantized, names, Xq[batch], batch)
            for name in target:
                self.totals.setdefault(name, Totals()).add(target[name], own[name], accumulated[name])
            Y[batch], Yq[batch] = target[BLOCK], accumulated[BLOCK]
            self.tokens += target[BLOCK].shape[:-1].numel()
        return Y, Yq

    def _outputs(self, block: nn.Module, names: Sequence[str], hidden: Tensor, batch: slice) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with _watched({name: block.get_submodule(name) for name in names}, found.__setitem__):
            found[BLOCK] = self.call.run(block, hidden, batch)
        return found


@contextlib.contextmanager
def _watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand `see` the name and the output of each of `modules` whenever it is computed."""

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: see(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norms(rows: Tensor) -> float:
    """The sum of the Euclidean norms of the rows."""
    return float(rows.norm(dim=-1).sum())
