"""Closed form: codes first, then the best A and B for them, linear by linear in input order."""

from __future__ import annotations

import torch

from apiq.adapters.configuration import targets
from apiq.adapters.targets import shapes
from apiq.blocks.problem import Problem, Solution
from apiq.grids.affine import encode
from apiq.grids.search import searched
from apiq.layers.packed import PackedLinear
from apiq.methods.gptq import add, error_feedback
from apiq.methods.grid import grid_in, nearest, packed, rank_in
from apiq.methods.moments import Fed, LinAlgError, damped, in_order, settle, singular
from apiq.methods.starts import best, given_adapters
from apiq.params import QuantizeParams


class ClosedForm:
    """Minimise || X W^T - Xq (Q + B A^T)^T || over A and B of rank r for given codes: exact, without descent.

    This is the objective of ApiQ-lw (equation 4); `objective` may also be the one of QERA, with Xq for X, or
    that of LoftQ, without activations. The codes are rounded to nearest on the whole range of a group or on a
    searched one, or are those of GPTQ on searched ranges. Damping adds || W - Q - B A^T ||^2 times a share of
    the mean square of the inputs, which keeps directions that the windows never show near the weight.
    """

    calibrated = True
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params

    def solve(self, problem: Problem) -> Solution:
        """Quantize all linears of one block and fit their adapters."""
        params, linears = self.params, problem.linears()
        carriers = targets(params, shapes(linears), strict=False)
        solution, factors = Solution({}), {}
        for fed in in_order(problem, params.batch_size, params.closed_form.objective == "asymmetric"):
            try:
                linear = self._codes(problem, fed)
                add(problem, solution, fed, linear, len(linears))
                if fed.name in carriers:
                    Q = linear.dequantized().float()
                    A, B = factors[fed.name] = best(
                        fed.linear.weight.detach().float(), Q, fed.moments, params, rank_in(problem, fed.name, params)
                    )
                    settle(problem, fed.name, Q + B @ A.t())
            except LinAlgError:
                raise singular(problem, fed.name, "quantize.closed_form.damping and quantize.gptq.damping") from None
        solution.adapters = given_adapters(factors, params)
        return solution

    @torch.no_grad()
    def _codes(self, problem: Problem, fed: Fed) -> PackedLinear:
        params, grid = self.params, grid_in(problem, fed.name, self.params)
        W = fed.linear.weight.detach().float()
        if params.closed_form.codes == "rtn":
            return packed(fed.linear, nearest(W, grid), grid)
        if params.closed_form.codes == "searched":
            s, z = searched(W, grid, fed.moments.G)
            return packed(fed.linear, (encode(W, s, z, grid), s, z), grid)
        H = damped(fed.moments.G, params.gptq.damping)
        return packed(fed.linear, error_feedback(W, H, grid, params.gptq.act_order, search=True), grid)
