"""The parameters of a group as one vector, so that a step of the optimizer is a handful of operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Group:
    """Parameters that share a learning rate and a weight decay."""

    parameters: list[nn.Parameter]
    lr: float
    decay: float


def names(module: nn.Module) -> dict[int, str]:
    """The names of the parameters of a module by their id."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


class Flat:
    """The parameters of a group and their gradients, float32, as views of one vector each until `release`."""

    def __init__(self, group: Group):
        self.lr, self.decay = group.lr, group.decay
        self._members = group.parameters
        self.values = nn.Parameter(torch.cat([member.detach().flatten() for member in self._members]))
        self.grad = torch.zeros_like(self.values)
        self.values.grad = self.grad
        for member, value, grad in zip(
            self._members, self._split(self.values.detach()), self._split(self.grad), strict=True
        ):
            member.data, member.grad = value, grad

    def unsound(self) -> list[nn.Parameter]:
        """The parameters with a value or a gradient that is not finite."""
        pairs = zip(self._members, self._split(self.values), self._split(self.grad), strict=True)
        return [member for member, value, grad in pairs if not bool((value.isfinite() & grad.isfinite()).all())]

    def release(self) -> None:
        """Give each parameter a memory of its own again, and no gradient."""
        for member in self._members:
            member.data, member.grad = member.detach().clone(), None

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([member.numel() for member in self._members])
        return [part.view(member.shape) for part, member in zip(parts, self._members, strict=True)]


class Optimizer:
    """AdamW (betas 0.9 and 0.999, eps 1e-8, decoupled decay) on flat groups, which can go back to a saved state."""

    def __init__(self, groups: Iterable[Group]):
        self.groups = [Flat(group) for group in groups]
        settings = [{"params": [group.values], "lr": group.lr, "weight_decay": group.decay} for group in self.groups]
        self._adamw = torch.optim.AdamW(settings, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def zero(self) -> None:
        """Set all gradients to 0."""
        for group in self.groups:
            group.grad.zero_()

    def step(self, share: float, shrink: float = 1.0) -> None:
        """One step at this share of the learning rates, on gradients multiplied by `shrink`."""
        for group, settings in zip(self.groups, self._adamw.param_groups, strict=True):
            settings["lr"] = group.lr * share
            if shrink != 1.0:
                group.grad.mul_(shrink)
        self._adamw.step()

    def values(self) -> list[Tensor]:
        """Copies of all parameters, one vector a group."""
        return [group.values.detach().clone() for group in self.groups]

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        """Set all parameters to what `values` gave."""
        for group, value in zip(self.groups, values, strict=True):
            group.values.copy_(value)

    def saved(self) -> tuple[list[Tensor], dict]:
        """Parameters and moments, copied."""
        state = self._adamw.state_dict()
        copied = {key: {name: value.clone() for name, value in entry.items()} for key, entry in state["state"].items()}
        return self.values(), {**state, "state": copied}

    def restore(self, saved: tuple[list[Tensor], dict]) -> None:
        """Back to what `saved` gave, which stays as it is."""
        values, state = saved
        self.put(values)
        copied = {key: {name: value.clone() for name, value in entry.items()} for key, entry in state["state"].items()}
        self._adamw.load_state_dict({**state, "state": copied})

    def finite(self) -> Tensor:
        """Whether every parameter is finite, a bool on the device."""
        return torch.stack([group.values.isfinite().all() for group in self.groups]).all()

    def release(self) -> None:
        """Leave the parameters as they are, each with a memory of its own."""
        for group in self.groups:
            group.release()
