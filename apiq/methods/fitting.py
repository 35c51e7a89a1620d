"""What the two ApiQ variants share: the block as it is fitted, what is trained in it in which order, what comes out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from apiq.adapters.configuration import targets
from apiq.adapters.injection import Adapters
from apiq.adapters.pooled import Pooling
from apiq.adapters.targets import shapes
from apiq.adapters.tuners import TUNERS, Tuner
from apiq.blocks.architecture import replace
from apiq.blocks.problem import Curve, Problem, Solution
from apiq.layers.fake_quant import FakeQuantLinear, computed_once
from apiq.methods.flat import Group
from apiq.methods.grid import grid_in
from apiq.methods.moments import in_order
from apiq.methods.starts import start_at_closed_form
from apiq.params import QuantizeParams


@dataclass(frozen=True)
class Turn:
    """A descent over a part of what is to be fitted."""

    number: int
    count: int
    grid: bool
    """Whether gamma and beta are trained, and W where it is."""
    adapters: bool
    """Whether the adapters are."""

    @property
    def label(self) -> str:
        """Which turn it is, where there are several."""
        return "" if self.count == 1 else f"{'ranges' if self.grid else 'adapters'} "

    def share(self, done: float) -> float:
        """The share of all turns that is done with a share of this one."""
        return (self.number + done) / self.count


def joined(curves: list[Curve], more: list[Curve]) -> list[Curve]:
    """Curves and what a further turn adds to them: those of one name go on where they ended."""
    known = {curve.name: curve for curve in curves}
    for curve in more:
        begun = known.get(curve.name)
        known[curve.name] = curve if begun is None else Curve(curve.name, begun.losses + curve.losses[1:])
    return list(known.values())


class Fit:
    """A block with FakeQuantLinear in the place of every linear, and adapters on some; everything else is frozen."""

    def __init__(self, problem: Problem, params: QuantizeParams):
        self.problem, self.params = problem, params
        self.tuner: Tuner | None = None
        self.adapters: Adapters | None = None
        self.fakes: dict[str, FakeQuantLinear] = {}
        self.unreached: list[str] = []
        problem.block.requires_grad_(False)
        originals = problem.linears()
        self.shapes = shapes(originals)
        if params.adapter != "none" and targets(params, self.shapes, strict=False):
            self.tuner = TUNERS[params.adapter]
        if self.tuner is not None and self.tuner.moves_weight:
            self._move_weight(originals)
        self._wrap(list(originals))
        self._search(originals)
        if self.tuner is not None and self.tuner.joint and self.adapters is None:
            with computed_once(self.fakes.values()):
                self.adapters = self._started()
        if params.start == "closed-form" and self.adapters is not None:
            start_at_closed_form(problem, self.adapters, originals, self.fakes, params)
        pools = params.pooled and self.adapters is not None
        self.pooling = Pooling(problem.block, "quantize.pooled") if pools else None
        for fake in self.fakes.values():
            fake.gamma.requires_grad_(True)
            fake.beta.requires_grad_(True)
            if params.lr_weight:
                fake.train_weight()

    def turns(self) -> Iterator[Turn]:
        """What is to be trained, in order; between two turns the block changes.

        Codes, ranges and adapters are fitted jointly where gradients allow. Adapters that pass none to the
        weight below them are put on the packed linears, once the ranges are fitted without them.
        """
        if self.tuner is None or self.tuner.joint:
            yield Turn(0, 1, grid=True, adapters=True)
            return
        yield Turn(0, 2, grid=True, adapters=False)
        for name, fake in self.fakes.items():
            replace(self.problem.block, name, fake.packed())
        self.adapters = self._started()
        yield Turn(1, 2, grid=False, adapters=True)

    def groups(self, turn: Turn, name: str = "") -> list[Group]:
        """The parameter groups of Table A.1 in the linear `name`, or in the whole block without one.

        Theta = (gamma, beta) and the adapters; before them the shifts of W where it is trained. Weight decay pulls
        towards 0, so adapter parameters for which 0 is not neutral are spared it.
        """
        params, groups = self.params, []
        if turn.grid:
            fakes = [self.fakes[name]] if name else list(self.fakes.values())
            theta = [parameter for fake in fakes for parameter in (fake.gamma, fake.beta)]
            groups.append(Group(theta, params.lr_theta, params.decay_theta))
            shifts = [fake.shift for fake in fakes if fake.shift is not None]
            groups += [Group(shifts, params.lr_weight, 0.0)] if shifts else []
        if turn.adapters and self.adapters is not None:
            inside = self.problem.block.get_submodule(name)
            for decays, decay in ((True, params.decay_adapter), (False, 0.0)):
                groups.append(Group(self.adapters.trained(inside, decays), params.lr_adapter, decay))
        return groups

    @property
    def weights(self) -> int:
        """The number of weights in all linears of the block."""
        return sum(fake.full_weight.numel() for fake in self.fakes.values())

    def solution(self, curves: list[Curve], start: float) -> Solution:
        """The packed linears and adapters as they were trained."""
        if self.pooling is not None:
            self.pooling.release()
        adapters = {} if self.adapters is None else self.adapters.state()
        packed = {name: fake.packed() for name, fake in self.fakes.items()}
        return Solution(packed, adapters, curves, start, self.unreached)

    def without_tokens(self, unreached: list[str]) -> None:
        """Fit the ranges of the linears `unreached` by any calibration token to their weights alone."""
        self.unreached = unreached
        for name in unreached:
            self.fakes[name].fit_range()

    def _move_weight(self, originals: dict[str, nn.Linear]) -> None:
        """Put adapters on copies of the linears, which they take a part of the weight from."""
        for name in targets(self.params, self.shapes, strict=False):
            replace(self.problem.block, name, copy.deepcopy(originals[name]))
        self.adapters = self._started()

    def _started(self) -> Adapters:
        problem = self.problem
        return Adapters(problem.block, self.params, self.shapes, problem.seed, start=True, ranks=problem.ranks)

    def _search(self, originals: dict[str, nn.Linear]) -> None:
        """Start the ranges where `quantize.ranges` says, linear by linear in input order."""
        if self.params.ranges == "weight":
            for fake in self.fakes.values():
                fake.fit_range()
        elif self.params.ranges == "output":
            for fed in in_order(self.problem, self.params.batch_size, originals=originals):
                self.fakes[fed.name].fit_range(fed.moments.G if fed.moments.reached else None)

    def _wrap(self, names: list[str]) -> None:
        """Put FakeQuantLinear in the place of every linear, below its adapter where it carries one already."""
        for name in names:
            module = self.problem.block.get_submodule(name)
            carried = isinstance(module, BaseTunerLayer)
            linear = module.get_base_layer() if carried else module
            assert isinstance(linear, nn.Linear)
            self.fakes[name] = FakeQuantLinear(linear, grid_in(self.problem, name, self.params))
            replace(self.problem.block, f"{name}.base_layer" if carried else name, self.fakes[name])
