"""How long work reports where it is: the library calls back, whoever called it shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Step:
    """One report of a running phase."""

    phase: str
    """What is being done, as in `quantize` or `perplexity`."""
    done: float
    """Units finished so far; a part of the unit in hand may be counted."""
    total: int
    """Units in all."""
    detail: str = ""
    """What the unit in hand is, as in `block 3/32`."""
    loss: float | None = None
    """The newest loss, where there is one."""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Report nothing."""


def naming(name: str, progress: Progress) -> Progress:
    """`progress` with `name` before every detail."""
    return lambda step: progress(replace(step, detail=f"{name}: {step.detail}"))
