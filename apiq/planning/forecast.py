"""From a timed trial to the time of a whole run.

A block costs c + p n + s n E seconds: c for what has the size of the weights (packing, writing), p for a batch that
is only passed through the block (teacher, propagation, errors), s for an optimizer step, over n batches and E
epochs. Three runs of the trial give the three; where the trial had to be narrower or shorter than the model, c
grows with the weights that are packed, p with the operations, and s with both, as two lengths show.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds of one block of the model."""

    constant: float
    batch: float
    step: float
    spread: float
    """Relative uncertainty."""
    shape: tuple[int, int]
    """Windows and tokens of a batch of the trial."""
    narrower: int
    """How many times the trial was narrower than the model."""

    def block(self, passed: int, stepped: int, epochs: int) -> float:
        """Seconds to quantize one block with so many batches that pass through it, and so many steps an epoch."""
        return self.constant + passed * self.batch + stepped * epochs * self.step


def fit(few: float, many: float, fitted: float, batches: tuple[int, int], epochs: int) -> tuple[float, float, float]:
    """c, p and s of c + p n + s n E from runs with (n_few, 0), (n_many, 0) and (n_many, E); none is negative."""
    low, high = batches
    p = max(0.0, (many - few) / (high - low)) if high > low else 0.0
    c = max(0.0, few - p * low)
    s = max(0.0, (fitted - c - p * high) / (high * epochs)) if epochs else 0.0
    return c, p, s


def two_sizes(longer: float, shorter: float, operations: tuple[float, float]) -> tuple[float, float]:
    """A and b of a + b F from the times of F = operations[0] and the fewer operations[1]; none is negative."""
    b = max(0.0, (longer - shorter) / (operations[0] - operations[1]))
    a = longer - b * operations[0]
    return (a, b) if a >= 0 else (0.0, longer / operations[0])
