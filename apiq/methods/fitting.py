"""What the two ApiQ variants share: wrapping the linears of a block, what is trained, what comes out."""

from __future__ import annotations

from torch import nn

from apiq.adapters import lora
from apiq.blocks.architecture import replace
from apiq.blocks.problem import Curve, Problem, Solution
from apiq.grids.affine import Grid
from apiq.layers.fake_quant import FakeQuantLinear
from apiq.methods.flat import Group
from apiq.params import QuantizeParams


def wrap(problem: Problem, params: QuantizeParams) -> dict[str, FakeQuantLinear]:
    """Put FakeQuantLinear with LoRA in the place of every linear of the block; everything else is frozen."""
    problem.block.requires_grad_(False)
    grid = Grid(params.bits, params.group_size, params.symmetric)
    fakes = {name: FakeQuantLinear(linear, grid) for name, linear in problem.linears().items()}
    for name, fake in fakes.items():
        replace(problem.block, name, fake)
    lora.inject(problem.block, fakes, params.rank, params.alpha, problem.seed)
    for fake in fakes.values():
        fake.gamma.requires_grad_(True)
        fake.beta.requires_grad_(True)
    return fakes


def groups(module: nn.Module, fakes: list[FakeQuantLinear], params: QuantizeParams) -> list[Group]:
    """The parameter groups of Table A.1: Theta = (gamma, beta) of `fakes`, and A, B inside `module`."""
    theta = [parameter for fake in fakes for parameter in (fake.gamma, fake.beta)]
    adapters = list(lora.parameters(module).values())
    return [
        Group(theta, params.lr_theta, params.decay_theta),
        Group(adapters, params.lr_adapter, params.decay_adapter),
    ]


def solution(
    problem: Problem, fakes: dict[str, FakeQuantLinear], curves: list[Curve], start: float, unreached: list[str]
) -> Solution:
    """The packed linears and adapters as they were trained."""
    adapters = {name: value.detach() for name, value in lora.parameters(problem.block).items()}
    return Solution({name: fake.packed() for name, fake in fakes.items()}, adapters, curves, start, unreached)
