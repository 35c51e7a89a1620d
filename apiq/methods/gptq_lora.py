"""GPTQ-LoRA: the codes of GPTQ below adapters that start at zero."""

from __future__ import annotations

from apiq.blocks.problem import Problem, Solution
from apiq.methods.gptq import quantize_in_order
from apiq.methods.inputs import place
from apiq.methods.starts import default_adapters
from apiq.params import QuantizeParams


class GptqLora:
    """Minimise || Xq (W - Q)^T || over codes as GPTQ does; A is random and B = 0, as in QLoRA."""

    calibrated = True
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params
        self.adapted = params.adapter != "none"

    def solve(self, problem: Problem) -> Solution:
        """Quantize all linears of one block, and give them adapters."""
        solution = quantize_in_order(problem, self.params)
        place(problem.block, solution.linears)
        solution.adapters = default_adapters(problem, self.params)
        return solution
