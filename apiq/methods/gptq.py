"""GPTQ: columns are rounded one by one, and the error of each is made good by those that follow (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from apiq.blocks.problem import Problem, Solution
from apiq.grids.affine import Grid, decode, encode, extrema, scale_and_zero
from apiq.grids.search import searched
from apiq.layers.packed import PackedLinear
from apiq.methods.grid import grid_in, packed
from apiq.methods.moments import Fed, LinAlgError, damped, in_order, settle, singular
from apiq.params import QuantizeParams

LAZY = 128
"""Columns whose errors reach the columns after them in one product."""


class Gptq:
    """Minimise || Xq (W - Q)^T || over codes, greedily, column by column, linear by linear in input order.

    Xq is what the linear gets once everything before it, in earlier blocks and in this one, is quantized.
    """

    calibrated = True
    adapted = False

    def __init__(self, params: QuantizeParams):
        self.params = params

    def solve(self, problem: Problem) -> Solution:
        """Quantize all linears of one block."""
        return quantize_in_order(problem, self.params)


@torch.no_grad()
def quantize_in_order(problem: Problem, params: QuantizeParams) -> Solution:
    """The linears of a block with the codes of GPTQ; the block is left with their dequantized weights.

    Raises:
        ApiqError: the moments of an input cannot be inverted.
    """
    count = len(problem.linears())
    solution = Solution({})
    for fed in in_order(problem, params.batch_size):
        grid = grid_in(problem, fed.name, params)
        W, H = fed.linear.weight.detach().float(), damped(fed.moments.G, params.gptq.damping)
        try:
            parts = error_feedback(W, H, grid, params.gptq.act_order)
        except LinAlgError:
            raise singular(problem, fed.name, "quantize.gptq.damping") from None
        add(problem, solution, fed, packed(fed.linear, parts, grid), count)
    return solution


def add(problem: Problem, solution: Solution, fed: Fed, linear: PackedLinear, count: int) -> None:
    """Take `linear` into the solution and let the block compute with its weight; report it as one of `count`."""
    solution.linears[fed.name] = linear
    if not fed.moments.reached:
        solution.unreached.append(fed.name)
    Q = linear.dequantized()
    settle(problem, fed.name, Q)
    error = output_error(fed.linear.weight.float() - Q, fed.moments.G)
    problem.report(len(solution.linears) / count, error, fed.name)


def output_error(D: Tensor, G: Tensor) -> float:
    """Mean over tokens and outputs of (X D^T)^2, for D (out, in) and G = X^T X / tokens."""
    return float(((D @ G) * D).sum() / len(D))


def error_feedback(
    W: Tensor, H: Tensor, grid: Grid, act_order: bool = False, search: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scales and zero points (out, G) of W (out, in) for the Hessian H = Xq^T Xq (in, in).

    Column i becomes q_i = quant(w_i); then w_j -= (w_i - q_i) [U]_ij / [U]_ii for all j > i, with the upper
    Cholesky factor U of H^-1 (equations 2 and 3, algorithm 1). A group's range is that of its weights when its
    first column is reached. With `act_order` columns come by falling diagonal of H, and since a group's columns
    are then scattered over the order, its range is that of the weights as they were given. With `search` the range
    is, of these weights too, the one that costs the outputs least (`apiq.grids.search`).

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    width = grid.width(W.shape[1])
    s, z = searched(W, grid, H) if search else scale_and_zero(*extrema(W, grid), grid)
    order = torch.arange(W.shape[1], device=W.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order])), upper=True)
    left, one, groups = W[:, order], Grid(grid.bits, 0, grid.symmetric), (order // width).tolist()
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for span in _spans(W.shape[1], width):
        block, errors = left[:, span].clone(), torch.zeros_like(left[:, span])
        for i, column in enumerate(range(span.start, span.stop)):
            group = groups[column]
            if not (act_order or search) and column % width == 0:
                rest = block[:, i : i + width] if i else left[:, column : column + width]
                s[:, group : group + 1], z[:, group : group + 1] = scale_and_zero(*extrema(rest, one), one)
            scale, zero, w = s[:, group : group + 1], z[:, group : group + 1], block[:, i : i + 1]
            code = encode(w, scale, zero, one)
            codes[:, column : column + 1] = code
            errors[:, i : i + 1] = (w - decode(code, scale, zero, one)) / U[column, column]
            block[:, i:] -= errors[:, i : i + 1] * U[column, column : span.stop]
        left[:, span.stop :] -= errors @ U[span, span.stop :]
    return codes[:, order.argsort()], s, z


def _spans(columns: int, width: int) -> Iterator[slice]:
    """Slices of at most LAZY columns that hold only whole groups, or lie in one group that is larger."""
    size = LAZY // width * width or LAZY
    run = max(size, width)
    for start in range(0, columns, run):
        stop = min(start + run, columns)
        yield from (slice(first, min(first + size, stop)) for first in range(start, stop, size))
