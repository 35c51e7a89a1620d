"""ApiQ-lw: one linear after another is quantized so that its output is preserved (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq import parallel
from apiq.blocks.activations import Activations, batches
from apiq.blocks.problem import Curve, Problem, Solution
from apiq.grids.compiled import many
from apiq.methods.annealing import annealed
from apiq.methods.descent import Objective, descend, steps
from apiq.methods.fitting import Fit, Turn, joined
from apiq.methods.flat import names as names_of
from apiq.methods.inputs import Fed, input_order, inputs, place
from apiq.params import QuantizeParams


class ApiqLayerwise:
    """argmin over Q, A, B of || X W - Xq (Q + A B^T) || (equation 4), linear by linear in input order.

    X is what the linear gets in the full-precision model, Xq what it gets once everything before it,
    in earlier blocks and in this one, is quantized. Linears that read the same tensor (query, key and
    value; gate and up) share X and Xq and are fitted one by one from them. An expert of a mixture gets other
    tokens in the two models: unless both give it every token, it is fitted to || Xq W - Xq (Q + A B^T) || on those of
    the quantized one.
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
            unreached: list[str] = []
            number = 0
            for names in order:
                Xq = inputs(problem, problem.Xq, adapted[names[0]])
                X = Xq
                if isinstance(Xq, Activations):
                    place(problem.block, originals)
                    own = inputs(problem, problem.X, originals[names[0]])
                    place(problem.block, adapted)
                    X = own if isinstance(own, Activations) else Xq
                for name in names:
                    linear = _Linear(name, number, len(originals), originals[name], adapted[name])
                    number += 1
                    if X is None or Xq is None:
                        unreached.append(name)
                    else:
                        curves = joined(curves, self._fit(problem, fit, turn, linear, X, Xq))
            if turn.grid:
                fit.without_tokens(unreached)
        return fit.solution(curves, start)

    def _fit(self, problem: Problem, fit: Fit, turn: Turn, linear: _Linear, X: Fed, Xq: Fed) -> list[Curve]:
        """The losses of the linear before the turn and after each epoch of it."""
        params = self.params

        def loss_of(batch: slice) -> tuple[Tensor, Tensor]:
            with problem.autocast():
                with torch.no_grad():
                    Y = linear.original(X[batch])
                output = linear.adapted(Xq[batch])
            whole = isinstance(Xq, Activations)
            loss = problem.distance(output.float(), Y, batch) if whole else F.mse_loss(output.float(), Y.float())
            return loss, loss

        def report(epoch: int, loss: float) -> None:
            share = turn.share((linear.number + epoch / params.epochs) / linear.count)
            problem.report(share, loss, f"{linear.name} {turn.label}epoch {epoch}/{params.epochs}")

        with torch.no_grad():
            weight = problem.weight if isinstance(Xq, Activations) else Xq.weight
            spans = batches(len(Xq), params.batch_size)
            losses = torch.stack([loss_of(span)[0] * weight(span) for span in spans]).sum()
            weights = losses.new_tensor(sum(weight(span) for span in spans))
            total, whole = parallel.add(torch.stack([losses, weights]))
            first = float(total) / max(float(whole), 1.0)
        scale = problem.loss_scale(params.batch_size * fit.fakes[linear.name].out_features)
        where = f"linear {linear.name} of block {problem.index}"
        ahead = fit.weights * steps(len(Xq), params)
        with annealed([fit.fakes[linear.name]], params) as anneal, many(ahead):
            objective = Objective(loss_of, len(Xq), where, weight, names_of(linear.adapted), scale, anneal=anneal)
            trace = descend(fit.groups(turn, linear.name), objective, params, problem.seed, report)
        return trace.curves(linear.name, first)


@dataclass(frozen=True)
class _Linear:
    """A linear to be fitted, as it was and as it is trained."""

    name: str
    number: int
    count: int
    original: nn.Module
    adapted: nn.Module
