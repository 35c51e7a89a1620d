"""ApiQ-bw: the linears of a block are quantized together so that its output is preserved (section 4.2)."""

from __future__ import annotations

import contextlib

from torch import Tensor

from apiq.blocks.problem import Curve, Problem, Solution
from apiq.grids.compiled import many
from apiq.layers.joint import jointly
from apiq.methods.annealing import annealed
from apiq.methods.descent import Objective, descend, steps
from apiq.methods.fitting import Fit, Turn, joined
from apiq.methods.flat import names
from apiq.methods.inputs import counting, never_reached
from apiq.params import QuantizeParams


class ApiqBlockwise:
    """argmin over Q, A, B of || F(W, X) - F(Q, A, B, Xq) || for a transformer block F, by gradient descent.

    With `second_term` the loss is || F(W, X) - F(Q, A, B, Xq) ||^2 + || F(W, Xq) - F(Q, A, B, Xq) ||^2,
    each a mean over all entries. The second term is in the authors' code (`aug_loss`, taken over from
    OmniQuant) but not in the paper: its target is the full-precision block on the input that the
    quantized block really gets, so it asks each block to preserve its own map besides undoing the
    error of the blocks before it. In the first block, where X = Xq, it doubles the loss.
    """

    calibrated = True
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params
        self.adapted = params.adapter != "none"

    def solve(self, problem: Problem) -> Solution:
        """Fit codes, clipping ranges and adapters of all linears of one block."""
        params, Xq, targets = self.params, problem.Xq, problem.targets
        assert Xq is not None and targets is not None
        own = targets
        if params.second_term and problem.index > 0:
            own = Xq.mapped(problem.run, params.batch_size)
        fit = Fit(problem, params)
        with counting(problem.block, fit.fakes) as tokens:
            first = problem.error(params.batch_size)

        def loss_of(batch: slice) -> tuple[Tensor, Tensor]:
            output = problem.run(Xq[batch], batch)
            error = problem.distance(output, targets[batch], batch)
            if not params.second_term:
                return error, error
            return error + problem.distance(output, own[batch], batch), error

        scale = problem.loss_scale(Xq.rows[0].numel() * params.batch_size)
        curves: list[Curve] = []
        for turn in fit.turns():

            def report(epoch: int, loss: float, turn: Turn = turn) -> None:
                problem.report(turn.share(epoch / params.epochs), loss, f"{turn.label}epoch {epoch}/{params.epochs}")

            where, named = f"block {problem.index}", names(problem.block)
            with contextlib.ExitStack() as stack:
                anneal = stack.enter_context(annealed(fit.fakes.values(), params))
                if anneal is None:
                    stack.enter_context(jointly(problem.block))
                stack.enter_context(many(fit.weights * steps(len(Xq), params)))
                objective = Objective(loss_of, len(Xq), where, problem.weight, named, scale, anneal=anneal)
                trace = descend(fit.groups(turn), objective, params, problem.seed, report)
            curves = joined(curves, trace.curves("block", first))
            if turn.grid:
                fit.without_tokens(never_reached(tokens, Xq.device))
        return fit.solution(curves, first)
