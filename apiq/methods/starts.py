"""Adapters that no descent has touched: at PEFT's start, or as factors that a closed form gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from apiq.adapters import lora
from apiq.blocks.problem import Problem
from apiq.params import QuantizeParams


def default_adapters(problem: Problem, names: Iterable[str], params: QuantizeParams) -> dict[str, Tensor]:
    """A uniform at random, B = 0 for the named linears; the block is left with adapters on them."""
    lora.inject(problem.block, names, params.rank, params.alpha, problem.seed)
    return {name: value.detach() for name, value in lora.parameters(problem.block).items()}


def given_adapters(factors: Mapping[str, tuple[Tensor, Tensor]], params: QuantizeParams) -> dict[str, Tensor]:
    """Factors A (in, r), B (out, r) by linear as PEFT parameters whose scaled product is A B^T."""
    share = (params.rank / params.alpha) ** 0.5
    state = {}
    for name, (A, B) in factors.items():
        state[f"{name}.lora_A.weight"] = (share * A.t()).contiguous()
        state[f"{name}.lora_B.weight"] = (share * B).contiguous()
    return state
