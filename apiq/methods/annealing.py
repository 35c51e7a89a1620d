"""Soft rounding during a descent: its temperature falls, and the last steps round as the deployed linear does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from apiq.params import QuantizeParams

HOT, COLD = 1.0, 0.05
"""Temperature of the first step, at which the staircase is nearly a line, and of the last soft one."""
HARD = 0.2
"""Share of the steps, the last ones, that round to nearest, straight-through."""


class Rounding(Protocol):
    """A linear that rounds softly at a temperature above 0."""

    temperature: float


def temperature(done: float) -> float:
    """The temperature of the step before which a share `done` of all steps was taken: geometric from HOT to COLD."""
    share = done / (1 - HARD)
    return HOT * (COLD / HOT) ** share if share < 1 else 0.0


@contextlib.contextmanager
def annealed(linears: Iterable[Rounding], params: QuantizeParams) -> Iterator[Callable[[float], None] | None]:
    """What is to be called with the share of the steps taken, before each; None where rounding is straight-through.

    Afterwards the linears round to nearest.
    """
    members = list(linears)

    def set_for(done: float) -> None:
        for member in members:
            member.temperature = temperature(done)

    try:
        yield set_for if params.rounding == "soft" else None
    finally:
        for member in members:
            member.temperature = 0.0
