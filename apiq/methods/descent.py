"""AdamW over batches of calibration windows, with a guard against numbers that are not finite.

The defaults are Table A.1 of the paper: constant rates, fixed order, no warm-up, the state of the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from apiq import parallel
from apiq.blocks.problem import Curve
from apiq.errors import ApiqError
from apiq.memory import halved, in_parts
from apiq.methods.flat import Group, Optimizer

RETRIES = 5
"""Times that an epoch is tried again, each time at half the rate, before giving up."""
RESCALES = 5
"""Times that in float16 it is tried with the loss scaled by 1/64 before that."""


@dataclass
class Objective:
    """What is to be minimised over which windows."""

    loss_of: Callable[[slice], tuple[Tensor, Tensor]]
    """The loss of some windows, and the one to show: means over what counts in them."""
    windows: int
    where: str
    """Its name in messages, as in `block 3`."""
    weight_of: Callable[[slice], float] = lambda batch: _length(batch)
    """How much counts in some windows: the share of a part of a batch in its loss."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of the parameters by their id, for messages."""
    scale: float | None = None
    """Factor on the loss in the backward pass, which keeps the gradients of float16 from vanishing."""
    remedy: str = "lower quantize.lr_theta, lr_weight and lr_adapter, or set quantize.dtype to float32"
    """What to do when it cannot be minimised, for messages."""
    anneal: Callable[[float], None] | None = None
    """Called before each step with the share of all steps that was taken, and with 1 before a loss held out."""


class Passes(Protocol):
    """How the windows are passed over; a section of params.yaml that says what each means."""

    epochs: Any
    batch_size: Any
    shuffle: Any
    schedule: Any
    held_out: Any
    patience: Any


class Keeper(Protocol):
    """Keeps the state of a descent after each epoch, so that it can be taken up there."""

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was saved before."""
        ...


@dataclass
class Trace:
    """Losses of a descent."""

    losses: list[float] = field(default_factory=list)
    """Mean of what is shown over the steps of each epoch."""
    held_out: list[float] = field(default_factory=list)
    """Loss on the windows set aside, before the first epoch and after each; empty without them."""

    def curves(self, name: str, first: float) -> list[Curve]:
        """As curves, of what is shown from `first` on and of the windows set aside."""
        curves = [Curve(name, [first, *self.losses])]
        return [*curves, Curve(f"{name} held out", self.held_out)] if self.held_out else curves


def steps(windows: int, params: Passes) -> int:
    """The most optimizer steps of a descent on so many windows."""
    return params.epochs * math.ceil(windows / params.batch_size)


def descend(
    groups: Iterable[Group],
    objective: Objective,
    params: Passes,
    seed: int,
    report: Callable[[int, float], None],
    keeper: Keeper | None = None,
) -> Trace:
    """Minimise the objective by `params.epochs` passes over its windows.

    The loss stays on the device within an epoch. An epoch with a loss or a parameter that is not finite is taken
    back and run again at half the rate. With `held_out` the best state by the loss on these windows is
    left, otherwise the last. A batch that does not fit into memory is divided, its gradients added. With a `keeper`
    a descent that was stopped goes on after its last finished epoch, with the same result.

    Raises:
        ApiqError: the loss was not finite even at 1/2^RETRIES of the rate, or one window does not fit into memory.
    """
    groups = [group for group in groups if group.parameters]
    if not groups:
        return Trace()
    optimizer = Optimizer(groups)
    try:
        return _Descent(optimizer, objective, params, seed).run(report, keeper)
    finally:
        optimizer.release()


class _Descent:
    def __init__(self, optimizer: Optimizer, objective: Objective, params: Passes, seed: int):
        self.optimizer, self.objective, self.params = optimizer, objective, params
        aside = math.ceil(params.held_out * objective.windows) if objective.windows > 1 else 0
        self.trained = objective.windows - aside
        self.part = params.batch_size  # windows in memory at a time
        self.factor = 1.0
        self.scale = objective.scale or 1.0
        self.rescales = 0 if objective.scale is None else RESCALES
        self.generator = torch.Generator().manual_seed(seed)

    def run(self, report: Callable[[int, float], None], keeper: Keeper | None) -> Trace:
        aside = self.trained < self.objective.windows
        trace, best = self._resumed(keeper) or (Trace(), self.optimizer.values() if aside else [])
        if trace.losses:
            report(len(trace.losses), trace.losses[-1])
        if aside and not trace.held_out:
            trace.held_out.append(self._held_out())
        for epoch in range(len(trace.losses), self.params.epochs):
            if aside and 0 < self.params.patience <= epoch - _lowest(trace.held_out):
                break
            trace.losses.append(self._guarded(epoch))
            if aside:
                trace.held_out.append(self._held_out())
                best = self.optimizer.values() if _lowest(trace.held_out) == epoch + 1 else best
            if keeper is not None:
                keeper.save(self._state(trace, best))
            report(epoch + 1, trace.losses[-1])
        if aside:
            self.optimizer.put(best)
        return trace

    def _state(self, trace: Trace, best: list[Tensor]) -> dict[str, Any]:
        return {
            "trace": [trace.losses, trace.held_out],
            "best": best,
            "optimizer": self.optimizer.saved(),
            "order": self.generator.get_state(),
            "numbers": [self.part, self.factor, self.scale, self.rescales],
        }

    def _resumed(self, keeper: Keeper | None) -> tuple[Trace, list[Tensor]] | None:
        state = None if keeper is None else keeper.load()
        if state is None:
            return None
        self.optimizer.restore(state["optimizer"])
        self.generator.set_state(state["order"])
        self.part, self.factor, self.scale, self.rescales = state["numbers"]
        return Trace(*state["trace"]), state["best"]

    def _guarded(self, epoch: int) -> float:
        """Run one epoch, again at a lower rate while a number is not finite; the mean loss."""
        batches = list(self._batches())
        shares = self._shares(batches)
        saved = self.optimizer.saved()
        while True:
            losses = [self._step(epoch, number, batches, shares) for number in range(len(batches))]
            losses = parallel.add(torch.stack(losses))
            sound = losses.isfinite()
            if bool(sound.all() & self.optimizer.finite()):
                return float(losses.mean())
            bad = len(batches) - 1 if bool(sound.all()) else int((~sound).int().argmax())
            culprit = self._culprit(epoch, bad, batches, shares, saved)
            if self.rescales:
                self.scale, self.rescales = self.scale / 64, self.rescales - 1
                continue
            self.factor /= 2
            if self.factor < 2.0**-RETRIES:
                raise ApiqError(
                    f"the loss of {self.objective.where} is not finite in epoch {epoch + 1}, step {bad + 1}{culprit}, "
                    f"even at 1/{2**RETRIES} of the learning rates: {self.objective.remedy}."
                )

    def _culprit(
        self, epoch: int, bad: int, batches: list[slice], shares: list[float], saved: tuple[list[Tensor], dict]
    ) -> str:
        """Take the epoch back to its start; say which parameter is the first to be unsound in the step `bad`."""
        self.optimizer.restore(saved)
        for number in range(bad):
            self._step(epoch, number, batches, shares)
        self._anneal(self._done(epoch, bad, batches))
        self._backward(batches[bad], shares[bad])
        unsound = [parameter for group in self.optimizer.groups for parameter in group.unsound()]
        self.optimizer.restore(saved)
        known = [self.objective.names[id(each)] for each in unsound if id(each) in self.objective.names]
        return f", parameter {known[0]}" if known else ""

    def _step(self, epoch: int, number: int, batches: list[slice], shares: list[float]) -> Tensor:
        """One step of the optimizer; the loss to be shown, on the device."""
        done = self._done(epoch, number, batches)
        self._anneal(done)
        shown = self._backward(batches[number], shares[number])
        for group in self.optimizer.groups:
            parallel.add(group.grad)
        share = self.factor
        if self.params.schedule == "cosine":
            share *= (1 + math.cos(math.pi * done)) / 2
        self.optimizer.step(share, 1 / self.scale)
        return shown

    def _done(self, epoch: int, number: int, batches: list[slice]) -> float:
        """The share of all steps that was taken before this one."""
        return (epoch * len(batches) + number) / (self.params.epochs * len(batches))

    def _anneal(self, done: float) -> None:
        if self.objective.anneal is not None:
            self.objective.anneal(done)

    def _shares(self, batches: list[slice]) -> list[float]:
        """The share of the windows of this process in the loss of each batch, which several processes may divide."""
        if parallel.size() == 1:
            return [1.0] * len(batches)
        own = torch.tensor([self.objective.weight_of(batch) for batch in batches], dtype=torch.float64)
        total = parallel.add(own.clone().to(self.optimizer.groups[0].grad.device)).cpu()
        return (own / total.clamp(min=1)).tolist()

    def _backward(self, batch: slice, share: float) -> Tensor:
        """Leave the gradients of the loss of `batch`; where it does not fit into memory, add those of its parts."""
        while True:
            self.optimizer.zero()
            try:
                return self._added(batch, share)
            except torch.OutOfMemoryError:
                pass  # what was allocated is held by the traceback until here
            self.part = halved(min(self.part, _length(batch)), f"a step of {self.objective.where}")

    def _added(self, batch: slice, share: float) -> Tensor:
        if self.part >= _length(batch):
            return self._differentiated(batch, share)
        whole = self.objective.weight_of(batch)
        starts = range(batch.start, batch.stop, self.part)
        parts = [slice(start, min(start + self.part, batch.stop)) for start in starts]
        shares = [share * self.objective.weight_of(part) / max(whole, 1) for part in parts]
        return torch.stack([self._differentiated(part, share) for part, share in zip(parts, shares, strict=True)]).sum()

    def _differentiated(self, batch: slice, share: float) -> Tensor:
        loss, shown = self.objective.loss_of(batch)
        factor = share * self.scale
        (loss if factor == 1.0 else loss * factor).backward()
        return shown.detach() if share == 1.0 else shown.detach() * share

    @torch.no_grad()
    def _held_out(self) -> float:
        """The mean loss on the windows set aside."""
        self._anneal(1.0)
        total = torch.zeros(2, dtype=torch.float64, device=self.optimizer.groups[0].grad.device)

        def add(part: slice) -> None:
            batch = slice(self.trained + part.start, self.trained + part.stop)
            weight = self.objective.weight_of(batch)
            total.add_(torch.stack([self.objective.loss_of(batch)[0] * weight, total.new_tensor(weight)]))

        aside = self.objective.windows - self.trained
        in_parts(aside, self.part, add, f"the loss of {self.objective.where} on windows held out")
        loss, weight = parallel.add(total).tolist()
        mean = loss / max(weight, 1.0)
        return mean if math.isfinite(mean) else math.inf

    def _batches(self) -> Iterator[slice]:
        """The batches of one epoch, in fixed order or another one; what is in a batch stays the same."""
        size = self.params.batch_size
        starts = torch.arange(0, self.trained, size)
        if self.params.shuffle:
            starts = starts[torch.randperm(len(starts), generator=self.generator)]
        for start in starts.tolist():
            yield slice(start, min(start + size, self.trained))


def _lowest(losses: list[float]) -> int:
    return losses.index(min(losses))


def _length(batch: slice) -> int:
    return batch.stop - batch.start
