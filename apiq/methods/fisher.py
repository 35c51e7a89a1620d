"""How much each weight of a linear counts, by its row and its column: the diagonal Fisher information, separated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-3
"""Least weight of a row or a column, relative to their mean: what counts for nothing still has an error."""


@dataclass(frozen=True)
class Weights:
    """The Fisher information F (out, in) as importance rows_i^2 columns_j^2."""

    importance: Tensor
    """The mean of F, without dimensions; 0 for a linear that no token reaches."""
    rows: Tensor
    """(out), mean square 1."""
    columns: Tensor
    """(in), mean square 1."""

    def to(self, device: torch.device) -> Weights:
        """The same on another device."""
        return Weights(*(value.to(device) for value in vars(self).values()))

    def error(self, D: Tensor) -> Tensor:
        """sum_ij F_ij D_ij^2 for an error D (out, in) of the weight: twice the loss that it costs to second order."""
        return self.importance * (self.rows[:, None] * D * self.columns).square().sum()


def separated(F: Tensor) -> Weights:
    """The diagonal Fisher information F (out, in) by the means of its rows and of its columns.

    LQ-LoRA (arXiv 2311.12023), section 3.3: with one weight a row and one a column the weighted low-rank problem is a
    singular value decomposition again. F is met exactly where it is a product of such weights.
    """
    mean = F.mean()
    return Weights(mean, *(_relative(F.mean(dim), mean) for dim in (1, 0)))


def alike(W: Tensor) -> Weights:
    """Weights that are 1 for every entry of W (out, in)."""
    return Weights(*(W.new_ones(shape) for shape in ((), *W.shape)))


def _relative(means: Tensor, mean: Tensor) -> Tensor:
    """The square roots of means relative to their own mean, at least FLOOR; 1 where there is nothing to go by."""
    return torch.where(mean > 0, means / mean, 1.0).sqrt().clamp(min=FLOOR)
