"""AdamW on a few parameter groups over batches in a fixed order, with a guard against numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apiq.errors import ApiqError

RETRIES = 5
"""Times that an epoch is tried again, each time at half the rate, before giving up."""


@dataclass
class Group:
    """Parameters that share a learning rate and a weight decay."""

    parameters: list[nn.Parameter]
    lr: float
    decay: float


def descend(
    groups: Iterable[Group],
    loss_of: Callable[[slice], tuple[Tensor, Tensor]],
    batches: list[slice],
    epochs: int,
    report: Callable[[int, float], None],
    where: str,
) -> list[float]:
    """Minimise the mean of `loss_of(batch)[0]`; return the mean of `loss_of(batch)[1]` over each epoch.

    Constant rates, betas 0.9 and 0.999, no warm-up, no shuffling (Table A.1). The loss stays on the
    device within an epoch. An epoch with a loss or a parameter that is not finite is taken back and
    run again at half the rate.

    Raises:
        ApiqError: the loss was not finite even at 1/2^RETRIES of the rate; names `where`.
    """
    groups = [group for group in groups if group.parameters]
    parameters = [parameter for group in groups for parameter in group.parameters]
    factor, means = 1.0, []
    optimizer = _adamw(groups)
    for epoch in range(epochs):
        good = [parameter.detach().clone() for parameter in parameters]
        state = _copy_state(optimizer)
        while True:
            mean = _epoch(optimizer, loss_of, batches)
            if mean == mean and abs(mean) != float("inf") and all(bool(p.isfinite().all()) for p in parameters):
                break
            with torch.no_grad():
                for parameter, value in zip(parameters, good, strict=True):
                    parameter.copy_(value)
            factor /= 2
            if factor < 2.0**-RETRIES:
                raise ApiqError(
                    f"the loss of {where} is not finite in epoch {epoch + 1}, even at 1/{2**RETRIES} of the learning "
                    "rates: lower quantize.lr_theta and quantize.lr_adapter, or set quantize.dtype to float32."
                )
            optimizer = _adamw(groups, factor)
            optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
        means.append(mean)
        report(epoch + 1, mean)
    return means


def _adamw(groups: list[Group], factor: float = 1.0) -> torch.optim.AdamW:
    settings = [{"params": g.parameters, "lr": g.lr * factor, "weight_decay": g.decay} for g in groups]
    return torch.optim.AdamW(settings, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _copy_state(optimizer: torch.optim.Optimizer) -> dict:
    state = optimizer.state_dict()
    copied = {key: {name: value.clone() for name, value in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": copied}


def _epoch(
    optimizer: torch.optim.Optimizer, loss_of: Callable[[slice], tuple[Tensor, Tensor]], batches: list[slice]
) -> float:
    total = None
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss, shown = loss_of(batch)
        loss.backward()
        optimizer.step()
        total = shown.detach() if total is None else total + shown.detach()
    return float("nan") if total is None else float(total) / len(batches)
