"""Second moments of what linears are fed, and the pass over a block in input order that uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apiq import parallel
from apiq.blocks.activations import Activations, at_once
from apiq.blocks.architecture import replace
from apiq.blocks.problem import Problem
from apiq.blocks.unfuse import linear_of
from apiq.errors import ApiqError
from apiq.memory import in_parts
from apiq.methods.inputs import input_order, place, watching

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Moments:
    """Means over all tokens that count; all zero for a linear that no token reaches."""

    G: Tensor
    """Xq^T Xq / tokens (in, in)."""
    M: Tensor
    """Xq^T X / tokens (in, in), where X was asked for; otherwise G."""
    magnitude: Tensor
    """Mean of |Xq|, (in)."""
    reached: bool
    """Whether any token does reach it."""


@dataclass(frozen=True)
class Fed:
    """A linear in its turn."""

    name: str
    linear: nn.Linear
    """With its full-precision weight."""
    moments: Moments


def in_order(
    problem: Problem,
    batch_size: int,
    paired: bool = False,
    originals: Mapping[str, nn.Linear] | None = None,
    windows: int | None = None,
) -> Iterator[Fed]:
    """The linears in the order in which they are called, with the moments of what reaches them.

    The moments are taken when a linear's turn comes, from the block as the caller has left it: what the
    caller put in the place of the earlier linears (see `settle`) decides Xq. `originals` are the
    full-precision linears where the block has others in their place already; `windows` how many of the first windows
    are looked at, if not all.
    """
    originals = originals or problem.linears()
    current = {name: problem.block.get_submodule(name) for name in originals}
    place(problem.block, originals)
    order = input_order(problem, originals)
    place(problem.block, current)
    for names in order:
        found = moments(problem, originals, names[0], batch_size, paired, windows)
        for name in names:
            yield Fed(name, originals[name], found)


@torch.no_grad()
def moments(
    problem: Problem,
    originals: Mapping[str, nn.Module],
    name: str,
    batch_size: int,
    paired: bool = False,
    windows: int | None = None,
) -> Moments:
    """The moments of what the linear `name` is fed by the block as it stands, in the first windows or in all.

    With `paired` X is what it is fed in the full-precision block, with `originals` in place, on the
    full-precision input. An expert gets tokens by a choice that the two blocks make differently; there
    X is taken to be Xq, unless both give it every token. Padding is left out, except before experts that
    get only some tokens, which carry no position. Added in float32, or in float64 where the activations
    are, over all processes.
    """
    hidden = problem.Xq
    assert hidden is not None
    current = {each: problem.block.get_submodule(each) for each in originals}
    width, length = originals[name].get_parameter("weight").shape[1], hidden.rows.shape[1]
    wide = {"dtype": torch.promote_types(hidden.rows.dtype, torch.float32), "device": hidden.device}
    sums = {"G": torch.zeros(width, width, **wide), "M": torch.zeros(width, width, **wide)}
    sums |= {"magnitude": torch.zeros(width, **wide), "tokens": torch.zeros((), **wide)}

    def add(batch: slice) -> None:
        fed = _fed(problem, hidden, batch, current[name])
        if not len(fed):
            return
        Xq = X = _counted(problem, fed, batch)
        if paired and len(fed) == length * (batch.stop - batch.start):
            place(problem.block, originals)
            try:
                own = _fed(problem, problem.X, batch, originals[name])
            finally:
                place(problem.block, current)
            X = _counted(problem, own, batch) if len(own) == len(fed) else Xq
        found = {"G": Xq.t() @ Xq, "M": Xq.t() @ X, "magnitude": Xq.abs().sum(0), "tokens": Xq.new_tensor(len(Xq))}
        for key, value in found.items():  # all of them are there: from here on memory cannot run out
            sums[key].add_(value)

    count = min(len(hidden), windows or len(hidden))
    in_parts(count, at_once(hidden, batch_size), add, f"a forward pass of block {problem.index}")
    G, M, magnitude, tokens = (parallel.add(value) for value in sums.values())
    return Moments(*(value / tokens.clamp(min=1) for value in (G, M, magnitude)), reached=bool(tokens))


def damped(G: Tensor, share: float) -> Tensor:
    """G plus `share` of its mean diagonal on the diagonal; the identity where G is zero."""
    mean = G.diagonal().mean()
    return G + torch.where(mean > 0, share * mean, 1.0) * torch.eye(len(G), dtype=G.dtype, device=G.device)


def singular(problem: Problem, name: str, key: str) -> ApiqError:
    """What to say of a linear whose damped moments have no Cholesky factor."""
    return ApiqError(
        f"the inputs of linear {name} in block {problem.index} are too much alike for their moments to be inverted: "
        f"raise {key}, or give more calibration windows."
    )


def settle(problem: Problem, name: str, weight: Tensor) -> None:
    """Let the block compute with `weight` (out, in) in the place of the linear `name`."""
    linear = problem.block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    replace(problem.block, name, linear_of(weight.to(linear.weight.dtype), linear.bias))


def _fed(problem: Problem, hidden: Activations | None, batch: slice, linear: nn.Module) -> Tensor:
    """The tokens (tokens, width) that `linear` is fed when the block runs on some windows; none for an idle expert."""
    assert hidden is not None
    caught: list[Tensor] = []
    with watching({"": linear}, lambda _, fed: caught.append(fed.flatten(0, -2))):
        problem.run(hidden[batch], batch)
    return torch.cat(caught) if caught else torch.empty(0)


def _counted(problem: Problem, fed: Tensor, batch: slice) -> Tensor:
    """The tokens in float32 or float64, without padding where every token is among them."""
    if problem.counted is not None and len(fed) == problem.counted[batch].numel():
        fed = fed[problem.counted[batch].flatten()]
    return fed.to(torch.promote_types(fed.dtype, torch.float32))
