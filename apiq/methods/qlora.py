"""QLoRA: NormalFloat weights below adapters that start at zero (arXiv 2305.14314)."""

from __future__ import annotations

from apiq.blocks.problem import Problem, Solution
from apiq.methods.grid import grid_in, rounded
from apiq.methods.inputs import place
from apiq.methods.starts import default_adapters
from apiq.params import QuantizeParams


class Qlora:
    """Each weight goes to the nearest NormalFloat level of its group; nothing is fitted before finetuning.

    Minimises nothing: the codes are round(W / max |W|) on the table of levels, A is random and B = 0,
    so the adapters change no output until they are trained.
    """

    calibrated = False
    adapted = True

    def __init__(self, params: QuantizeParams):
        self.params = params
        self.adapted = params.adapter != "none"

    def solve(self, problem: Problem) -> Solution:
        """Round every linear, and give it adapters."""
        found = problem.linears()
        quantized = {name: rounded(linear, grid_in(problem, name, self.params)) for name, linear in found.items()}
        place(problem.block, quantized)  # some adapters, as DoRA, start at what lies below them
        return Solution(quantized, default_adapters(problem, self.params))
