"""OmniQuant: clipping ranges and equivalent transformations, learnt block by block (arXiv 2308.13137)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq.blocks.architecture import replace
from apiq.blocks.problem import Problem, Solution
from apiq.grids.affine import Grid, clipped, encode, extrema
from apiq.grids.compiled import many
from apiq.grids.soft import soft_quantize
from apiq.layers.fake_quant import START
from apiq.layers.packed import PackedLinear
from apiq.methods.annealing import annealed
from apiq.methods.descent import Objective, descend, steps
from apiq.methods.equivalent import Pair, pairs, put, transformed
from apiq.methods.flat import Group, names
from apiq.methods.grid import grid_in, packed
from apiq.methods.inputs import counting, never_reached
from apiq.params import QuantizeParams


class Omniquant:
    """Minimise || F(W, X) - F(Q, Xq) || for a transformer block F over clipping ranges and factors of channels.

    The range of a group is sigmoid(beta) low .. sigmoid(gamma) high of the weight W c, where c = exp(t) > 0 scales
    the channels that a pair of `apiq.methods.equivalent` lets through (equation 3, weights only); t starts at 0. Where
    nothing can take the factors, and with `transform` off, only the ranges are learnt. The shift of
    the paper's transformation is left out: it needs a bias, and today's models have none.
    """

    calibrated = True
    adapted = False

    def __init__(self, params: QuantizeParams):
        self.params = params

    def solve(self, problem: Problem) -> Solution:
        """Fit ranges and factors of one block."""
        params, Xq, targets = self.params, problem.Xq, problem.targets
        assert Xq is not None and targets is not None
        found = pairs(problem) if params.omniquant.transform else []
        fakes, logs = _wrap(problem, found, params)
        with counting(problem.block, fakes) as tokens:
            first = problem.error(params.batch_size)

        def loss_of(batch: slice) -> tuple[Tensor, Tensor]:
            error = problem.distance(problem.run(Xq[batch], batch), targets[batch], batch)
            return error, error

        def report(epoch: int, loss: float) -> None:
            problem.report(epoch / params.epochs, loss, f"epoch {epoch}/{params.epochs}")

        ranges = [parameter for fake in fakes.values() for parameter in (fake.gamma, fake.beta)]
        groups = [Group(ranges, params.lr_theta, params.decay_theta), Group(logs, params.omniquant.lr_transform, 0.0)]
        scale = problem.loss_scale(Xq.rows[0].numel() * params.batch_size)
        weights = sum(fake.original.weight.numel() for fake in fakes.values())
        with annealed(fakes.values(), params) as anneal, many(weights * steps(len(Xq), params)):
            objective = Objective(
                loss_of, len(Xq), f"block {problem.index}", problem.weight, names(problem.block), scale, anneal=anneal
            )
            trace = descend(groups, objective, params, problem.seed, report)
        quantized, others = _unwrap(problem, found, fakes, logs)
        return Solution(
            quantized,
            others=others,
            curves=trace.curves("block", first),
            start=first,
            unreached=never_reached(tokens, Xq.device),
        )


class TransformedLinear(nn.Linear):
    """Computes with Q(W c / r; gamma, beta) r / c: its channels scaled by c, and by 1 / r where it writes for others.

    `reads` and `writes` are the logarithms of c (in) and r (out), None for 1. The quotient stands in for what the
    writer before and the readers after it take up, so the block need not be changed while it is fitted.
    """

    def __init__(self, linear: nn.Linear, grid: Grid, reads: nn.Parameter | None, writes: nn.Parameter | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.grid = linear.in_features, linear.out_features, grid
        self.original, self.reads, self.writes = linear, reads, writes
        self.temperature = 0.0  # of soft rounding, while it is annealed
        shape = (linear.out_features, grid.groups(linear.in_features))
        self.gamma = nn.Parameter(torch.full(shape, START, device=linear.weight.device))
        self.beta = nn.Parameter(torch.full(shape, START, device=linear.weight.device))

    def transformed(self) -> Tensor:
        """W c / r (out, in), float32."""
        W = self.original.weight.float()
        W = W if self.reads is None else W * self.reads.exp()
        return W if self.writes is None else W * (-self.writes).exp().unsqueeze(-1)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Q r / c (out, in), differentiable, in the dtype of W."""
        W = self.transformed()
        s, z = clipped(self.gamma, self.beta, *extrema(W, self.grid), self.grid)
        Q = soft_quantize(W, s, z, self.grid, self.temperature)
        Q = Q if self.reads is None else Q * (-self.reads).exp()
        Q = Q if self.writes is None else Q * self.writes.exp().unsqueeze(-1)
        return Q.to(self.original.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """X (Q r / c)^T + bias, for X (..., in)."""
        return F.linear(input, self.weight, self.original.bias)

    @torch.no_grad()
    def packed(self, folded: nn.Linear) -> PackedLinear:
        """Q of the weight of `folded`, which is W c / r, on the ranges that were learnt."""
        W = folded.weight.float()
        s, z = clipped(self.gamma, self.beta, *extrema(W, self.grid), self.grid)
        return packed(folded, (encode(W, s, z, self.grid), s, z), self.grid)


def _wrap(
    problem: Problem, found: list[Pair], params: QuantizeParams
) -> tuple[dict[str, TransformedLinear], list[nn.Parameter]]:
    """Put transformed linears in the place of all; everything else is frozen. Also the logarithms, one a pair."""
    problem.block.requires_grad_(False)
    linears = problem.linears()
    logs = [nn.Parameter(torch.zeros_like(linears[pair.readers[0]].weight[0], dtype=torch.float32)) for pair in found]
    reads = {name: log for pair, log in zip(found, logs, strict=True) for name in pair.readers}
    writes = {pair.writer: log for pair, log in zip(found, logs, strict=True)}
    fakes = {
        name: TransformedLinear(linear, grid_in(problem, name, params), reads.get(name), writes.get(name))
        for name, linear in linears.items()
    }
    for name, fake in fakes.items():
        replace(problem.block, name, fake)
    return fakes, logs


def _unwrap(
    problem: Problem, found: list[Pair], fakes: dict[str, TransformedLinear], logs: list[nn.Parameter]
) -> tuple[dict[str, PackedLinear], dict[str, Tensor]]:
    """The packed linears, and the norms that took up the factors."""
    for name, fake in fakes.items():
        replace(problem.block, name, fake.original)
    others: dict[str, Tensor] = {}
    for pair, log in zip(found, logs, strict=True):
        changed = transformed(problem.block, pair, log.detach().exp())
        put(problem.block, changed)
        others.update({name: value for name, value in changed.items() if name.rpartition(".")[0] not in fakes})
    folded = problem.linears()
    return {name: fake.packed(folded[name]) for name, fake in fakes.items()}, others
