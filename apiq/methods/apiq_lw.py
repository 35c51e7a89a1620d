"""ApiQ-lw: one linear after another is quantized so that its output is preserved (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apiq import parallel
from apiq.blocks.activations import Activations, Batch, at_once, batches
from apiq.blocks.architecture import replace
from apiq.blocks.problem import Curve, Problem, Solution
from apiq.methods.descent import Objective, descend
from apiq.methods.fitting import Fit, Turn, joined
from apiq.params import QuantizeParams


class ApiqLayerwise:
    """argmin over Q, A, B of || X W - Xq (Q + A B^T) || (equation 4), linear by linear in input order.

    X is what the linear gets in the full-precision model, Xq what it gets once everything before it,
    in earlier blocks and in this one, is quantized. Linears that read the same tensor (query, key and
    value; gate and up) share X and Xq and are fitted one by one from them.
    """

    calibrated = True
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params
        self.adapted = params.adapter != "none"

    def solve(self, problem: Problem) -> Solution:
        """Fit codes, clipping ranges and adapters of all linears of one block, in input order."""
        originals = problem.linears()
        order = input_order(problem, originals)
        fit = Fit(problem, self.params)
        start = problem.error(self.params.batch_size)
        curves: list[Curve] = []
        for turn in fit.turns():
            adapted = {name: problem.block.get_submodule(name) for name in originals}
            number = 0
            for names in order:
                _place(problem.block, originals)
                X = _inputs(problem, problem.X, originals[names[0]], self.params.batch_size)
                _place(problem.block, adapted)
                Xq = _inputs(problem, problem.Xq, adapted[names[0]], self.params.batch_size)
                for name in names:
                    linear = _Linear(name, number, len(originals), originals[name], adapted[name])
                    curves = joined(curves, self._fit(problem, fit, turn, linear, X, Xq))
                    number += 1
        return fit.solution(curves, start)

    def _fit(
        self, problem: Problem, fit: Fit, turn: Turn, linear: _Linear, X: Activations, Xq: Activations
    ) -> list[Curve]:
        """The losses of the linear before the turn and after each epoch of it."""
        params = self.params

        def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
            with problem.autocast():
                with torch.no_grad():
                    Y = linear.original(X[batch])
                output = linear.adapted(Xq[batch])
            loss = problem.distance(output.float(), Y, batch)
            return loss, loss

        def report(epoch: int, loss: float) -> None:
            share = turn.share((linear.number + epoch / params.epochs) / linear.count)
            problem.report(share, loss, f"{linear.name} {turn.label}epoch {epoch}/{params.epochs}")

        with torch.no_grad():
            spans = batches(len(Xq), at_once(Xq, params.batch_size))
            shares = [loss_of(span)[0] * problem.weight(span) for span in spans]
            weights = torch.tensor(float(sum(problem.weight(span) for span in spans)), device=Xq.device)
            total, weight = parallel.add(torch.stack([torch.stack(shares).sum(), weights]))
            first = float(total) / max(float(weight), 1.0)
        scale = problem.loss_scale(Xq.rows.shape[1] * fit.fakes[linear.name].out_features * params.batch_size)
        where = f"linear {linear.name} of block {problem.index}"
        objective = Objective(loss_of, len(Xq), where, problem.weight, linear.adapted, scale)
        return descend(fit.groups(turn, linear.name), objective, params, problem.seed, report).curves(
            linear.name, first
        )


@dataclass(frozen=True)
class _Linear:
    """A linear to be fitted, as it was and as it is trained."""

    name: str
    number: int
    count: int
    original: nn.Module
    adapted: nn.Module


@torch.no_grad()
def input_order(problem: Problem, originals: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of the linears in the order in which the block calls them; those fed the same tensor stand together."""
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

    hooks = [module.register_forward_pre_hook(recorder(name)) for name, module in originals.items()]
    try:
        problem.run(problem.X[slice(0, 1)], slice(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return order


@torch.no_grad()
def _inputs(problem: Problem, hidden: Activations | None, linear: nn.Module, batch_size: int) -> Activations:
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


def _place(block: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        replace(block, name, module)
