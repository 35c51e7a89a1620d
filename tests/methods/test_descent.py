"""The optimizer is AdamW, it finds its way round numbers that are not finite, and it fits into memory."""

import math

import pytest
import torch
from torch import nn

from apiq.errors import ApiqError
from apiq.methods.descent import Objective, descend
from apiq.methods.flat import Group, names
from apiq.params import QuantizeParams


def settings(**values):
    return QuantizeParams(**{"recipe": "paper", "epochs": 4, "batch_size": 2, **values})


def silent(epoch, loss):
    pass


def quadratic(parameter, targets, **more):
    def loss_of(batch):
        loss = (parameter - targets[batch]).square().mean()
        return loss, loss

    return Objective(loss_of, len(targets), "it", **more)


def fitted(targets, **values):
    """The parameter and the trace of a descent on `targets`."""
    parameter = nn.Parameter(torch.zeros(targets.shape[1]))
    groups = [Group([parameter], 0.05, 0.1)]
    return parameter, descend(groups, quadratic(parameter, targets), settings(**values), 0, silent)


@pytest.fixture
def targets():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_it_takes_the_steps_of_adamw_in_order(targets, schedule):
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))
    twins = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))]

    def loss_of(pair, batch):
        return (pair[0] - targets[batch]).square().mean() + (pair[1] - targets[batch, :2].mean()).square().sum()

    objective = Objective(lambda batch: (loss_of((one, other), batch),) * 2, 6, "it")
    groups = [Group([one], 0.05, 0.1), Group([other], 0.01, 0.0), Group([], 1.0, 0.0)]
    trace = descend(groups, objective, settings(schedule=schedule), 0, silent)

    optimizer = torch.optim.AdamW(
        [{"params": twins[:1], "lr": 0.05, "weight_decay": 0.1}, {"params": twins[1:], "lr": 0.01, "weight_decay": 0.0}]
    )
    rate = (lambda step: 1.0) if schedule == "constant" else (lambda step: (1 + math.cos(math.pi * step / 12)) / 2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    expected = []
    for _ in range(4):
        losses = []
        for start in (0, 2, 4):
            optimizer.zero_grad()
            loss = loss_of(twins, slice(start, start + 2))
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        expected.append(sum(losses) / 3)
    for mine, reference in zip((one, other), twins, strict=True):
        torch.testing.assert_close(mine, reference)
    assert trace.losses == pytest.approx(expected, rel=1e-5)
    assert not trace.held_out


def test_parameters_are_left_with_memory_of_their_own_and_without_gradients(targets):
    parameter, _ = fitted(targets)
    assert parameter.grad is None
    assert parameter.untyped_storage().nbytes() == 3 * 4


def test_every_window_is_used_once_an_epoch_and_shuffling_changes_the_order_only():
    def orders(**values):
        parameter, met = nn.Parameter(torch.zeros(1)), []

        def loss_of(batch):
            met.append(torch.arange(7)[batch].tolist())
            return parameter.square().sum(), parameter.square().sum()

        descend([Group([parameter], 0.1, 0.0)], Objective(loss_of, 7, "it"), settings(**values), 5, silent)
        flat = [window for batch in met for window in batch]
        return [flat[start : start + 7] for start in range(0, 28, 7)]

    assert orders() == [list(range(7))] * 4
    for size in (1, 2):
        shuffled = orders(shuffle=True, batch_size=size)
        assert all(sorted(epoch) == list(range(7)) for epoch in shuffled)
        assert len({tuple(epoch) for epoch in shuffled}) == 4
        assert shuffled == orders(shuffle=True, batch_size=size)


def test_the_best_state_on_the_held_out_windows_is_kept():
    """The held-out windows want 0.2, the others 1: the best state is passed on the way."""
    targets = torch.ones(10, 1)
    targets[8:] = 0.2
    parameter, trace = fitted(targets, held_out=0.2, epochs=12)
    assert len(trace.held_out) == 13 and len(trace.losses) == 12
    best = min(trace.held_out)
    assert trace.held_out.index(best) not in (0, 12)
    assert float((parameter.detach() - 0.2).square()) == pytest.approx(best, rel=1e-5)
    last, _ = fitted(targets[:8], epochs=12)
    assert float(last.detach()) > 0.5 > float(parameter.detach())


def test_patience_ends_a_descent_that_does_not_gain():
    targets = torch.ones(10, 1)
    targets[8:] = 0.2
    _, whole = fitted(targets, held_out=0.2, epochs=12)
    _, ended = fitted(targets, held_out=0.2, epochs=12, patience=2)
    best = whole.held_out.index(min(whole.held_out))
    assert ended.held_out == whole.held_out[: best + 3]


def test_a_start_that_is_never_beaten_is_kept():
    targets = torch.ones(4, 1)
    targets[3:] = 0.0
    parameter, trace = fitted(targets, held_out=0.25)
    assert float(parameter.detach()) == 0.0 and trace.held_out[0] == 0.0


@pytest.mark.parametrize("fits", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_that_does_not_fit_is_divided_with_the_same_result(targets, fits, shuffle):
    """Also where the windows count differently, as with padding."""
    counted = torch.tensor([1.0, 5.0, 2.0, 0.0, 3.0, 4.0])
    results = []
    for limit in (6, fits):
        parameter = nn.Parameter(torch.zeros(3))
        sizes = []

        def loss_of(batch, parameter=parameter, limit=limit, sizes=sizes):
            if len(targets[batch]) > limit:
                raise torch.OutOfMemoryError
            sizes.append(len(targets[batch]))
            weight = counted[batch].unsqueeze(-1)
            loss = ((parameter - targets[batch]).square() * weight).sum() / weight.sum().clamp(min=1) / 3
            return loss, loss

        objective = Objective(loss_of, 6, "it", weight_of=lambda batch: float(counted[batch].sum()))
        params = settings(batch_size=6, shuffle=shuffle)
        trace = descend([Group([parameter], 0.05, 0.1)], objective, params, 0, silent)
        results.append((parameter.detach(), torch.tensor(trace.losses), sizes))
    (whole, losses, _), (divided, divided_losses, sizes) = results
    torch.testing.assert_close(divided, whole)
    torch.testing.assert_close(divided_losses, losses)
    assert max(sizes) <= fits


@pytest.mark.parametrize("fits", [1, 2])
def test_windows_held_out_are_divided_like_those_of_a_step(targets, fits):
    traces = []
    for limit in (3, fits):
        parameter = nn.Parameter(torch.zeros(3))
        refused = []

        def loss_of(batch, parameter=parameter, limit=limit, refused=refused):
            if len(targets[batch]) > limit:
                refused.append(torch.is_grad_enabled())
                raise torch.OutOfMemoryError
            loss = (parameter - targets[batch]).square().mean()
            return loss, loss

        params = settings(batch_size=3, held_out=0.5)
        traces.append(descend([Group([parameter], 0.05, 0.1)], Objective(loss_of, 6, "it"), params, 0, silent))
    whole, divided = traces
    assert divided.held_out == pytest.approx(whole.held_out, rel=1e-5)
    assert divided.losses == pytest.approx(whole.losses, rel=1e-5)
    assert refused == sorted(refused)  # before the first step, in it, and no more


def test_a_window_that_does_not_fit_is_refused_with_what_to_change():
    parameter = nn.Parameter(torch.zeros(1))

    def loss_of(batch):
        raise torch.OutOfMemoryError

    with pytest.raises(ApiqError, match=r"memory for a step of block 3 .* calibration.length"):
        descend([Group([parameter], 0.1, 0.0)], Objective(loss_of, 4, "block 3"), settings(), 0, silent)


def test_the_scale_of_the_loss_changes_nothing_else(targets):
    results = []
    for scale in (None, 1024.0):
        parameter = nn.Parameter(torch.zeros(3))
        objective = quadratic(parameter, targets, scale=scale)
        trace = descend([Group([parameter], 0.05, 0.1)], objective, settings(), 0, silent)
        results.append((parameter.detach(), trace.losses))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_bad_epoch_is_taken_back_and_run_at_half_the_rate():
    parameter, met = nn.Parameter(torch.ones(1)), []

    def loss_of(batch):
        # a cliff: beyond 1.35 the loss is not a number
        loss = torch.where(parameter > 1.35, torch.nan, -parameter).sum()
        met.append(parameter.item())
        return loss, loss

    objective = Objective(loss_of, 3, "it")
    trace = descend([Group([parameter], 0.4, 0.0)], objective, settings(batch_size=1, epochs=1), 0, silent)
    assert math.isfinite(trace.losses[0])
    assert 1.0 < parameter.item() < 1.35
    assert met[-3:] == pytest.approx([1.0, 1.1, 1.2])  # at a quarter of the rate


def test_a_hopeless_loss_is_refused_with_where_and_what_to_change():
    module = nn.ParameterDict({"calm": nn.Parameter(torch.ones(1)), "wild": nn.Parameter(torch.ones(1))})
    calls = []

    def loss_of(batch):
        calls.append(batch)
        wild = module["wild"] * (torch.nan if batch.start == 2 else 1.0)
        loss = module["calm"].square().sum() + wild.sum()
        return loss, loss

    objective = Objective(loss_of, 3, "block 7", names=names(module))
    told = r"block 7 is not finite in epoch 1, step 3, parameter wild, .*lr_theta"
    with pytest.raises(ApiqError, match=told):
        descend([Group(list(module.values()), 0.1, 0.0)], objective, settings(batch_size=1), 0, silent)
    assert all(torch.equal(parameter.detach(), torch.ones(1)) for parameter in module.values())
