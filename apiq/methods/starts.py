"""Adapters that no descent has touched: at PEFT's start, or as a closed form gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apiq import parallel
from apiq.adapters.closed_form import asymmetric, plain, whitened
from apiq.adapters.configuration import targets
from apiq.adapters.injection import Adapters
from apiq.adapters.pooled import Pooling
from apiq.adapters.targets import shapes
from apiq.blocks.problem import Problem
from apiq.methods.grid import rank_in
from apiq.methods.moments import LinAlgError, Moments, damped, in_order, singular
from apiq.params import QuantizeParams

TOKENS = 16
"""Tokens for each input of the widest linear from which a start at the closed form takes its moments."""


def default_adapters(problem: Problem, params: QuantizeParams) -> dict[str, Tensor]:
    """The adapters of a block as they start, at which they change nothing; they are left on the block's linears.

    With `quantize.pooled` these must be packed.
    """
    linears = shapes(problem.linears())
    if params.adapter == "none" or not targets(params, linears, strict=False):
        return {}
    adapters = Adapters(problem.block, params, linears, problem.seed, start=True, ranks=problem.ranks)
    if params.pooled:
        Pooling(problem.block, "quantize.pooled").release()
    return adapters.state()


def given_adapters(factors: Mapping[str, tuple[Tensor, Tensor]], params: QuantizeParams) -> dict[str, Tensor]:
    """Factors A (in, r), B (out, r) by linear as LoRA whose scaled product is A B^T."""
    share = (params.rank / params.alpha) ** 0.5
    state = {}
    for name, (A, B) in factors.items():
        state[f"{name}.lora_A.weight"] = (share * A.t()).contiguous()
        state[f"{name}.lora_B.weight"] = (share * B).contiguous()
    return state


def start_at_closed_form(
    problem: Problem,
    adapters: Adapters,
    originals: Mapping[str, nn.Linear],
    quantized: Mapping[str, nn.Linear],
    params: QuantizeParams,
) -> None:
    """Set the adapters of the block to the best ones for the present codes, linear by linear in input order.

    `originals` are the full-precision linears, `quantized` the ones below the adapters, whose weight is Q. Only as many
    windows are looked at as hold TOKENS tokens for each input of the widest linear, and the singular vectors are
    found by a randomized method: what follows is a descent.

    Raises:
        ApiqError: the moments of an input cannot be inverted.
    """
    carriers = targets(params, shapes(originals), strict=False)
    paired, windows = params.closed_form.objective == "asymmetric", _windows(problem, originals)
    for fed in in_order(problem, params.batch_size, paired, originals, windows):
        if fed.name not in carriers:
            continue
        W, Q = fed.linear.weight.detach().float(), quantized[fed.name].weight.detach().float()
        try:
            factors = best(W, Q, fed.moments, params, rank_in(problem, fed.name, params), exact=False)
        except LinAlgError:
            raise singular(problem, fed.name, "quantize.closed_form.damping") from None
        adapters.load({**adapters.state(), **given_adapters({fed.name: factors}, params)})


def _windows(problem: Problem, linears: Mapping[str, nn.Linear]) -> int:
    """How many windows of this process hold its share of the tokens."""
    assert problem.X is not None
    widest = max(linear.in_features for linear in linears.values())
    return math.ceil(TOKENS * widest / problem.X.rows.shape[1] / parallel.size())


@torch.no_grad()
def best(
    W: Tensor, Q: Tensor, moments: Moments, params: QuantizeParams, rank: int, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """A (in, r) and B (out, r) of rank r that the parameters ask for, for W and Q (out, in).

    Raises:
        torch.linalg.LinAlgError: the damped moments are not positive definite.
    """
    objective, damping = params.closed_form.objective, params.closed_form.damping
    if objective == "plain":
        return plain(W, Q, rank, exact)
    G = damped(moments.G, damping)
    if objective == "whitened":
        return whitened(W, Q, G, rank, exact)
    return asymmetric(W, Q, G, moments.M + G - moments.G, rank, exact)
