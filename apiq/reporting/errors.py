"""The errors of weights and activations as the evaluation measured them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from apiq.reporting import records

MEASURED = (
    "weight_norm",
    "weight_error_without",
    "weight_error_with",
    "activation_norm",
    "activation_error_own",
    "activation_error_accumulated",
)
BLOCK = "block"
"""What stands in the place of a linear for the output of the block."""


@dataclass(frozen=True)
class LinearErrors:
    """The errors of one linear, or of a block, in one model; `apiq.evaluation.errors.Errors` says what they are."""

    model: str
    """rtn, quantized, ..."""
    block: int
    kind: str
    """The name of the linear in its block, without numbers of experts; BLOCK for the block as a whole."""
    weight_norm: float | None
    weight_error_without: float | None
    weight_error_with: float | None
    activation_norm: float | None
    activation_error_own: float | None
    activation_error_accumulated: float | None

    @property
    def weight_error(self) -> float | None:
        """With adapters where they are a sum with the weight, else without."""
        return self.weight_error_without if self.weight_error_with is None else self.weight_error_with


def read_errors(path: Path) -> tuple[LinearErrors, ...]:
    """Read errors.csv of the evaluation.

    Raises:
        ApiqError: it is damaged.
    """
    return tuple(
        LinearErrors(
            row["model"],
            int(records.value(path, row, "block") or 0),
            re.sub(r"\.\d+(?=\.)", "", row["linear"]),
            *(records.value(path, row, column) for column in MEASURED),
        )
        for row in records.rows(path, ("model", "block", "linear", *MEASURED))
    )
