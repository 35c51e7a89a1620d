"""The optimizer is AdamW, and it survives numbers that are not finite."""

import pytest
import torch
from torch import nn

from apiq.errors import ApiqError
from apiq.methods.descent import Group, descend


def quadratic(parameter, targets):
    def loss_of(batch):
        loss = (parameter - targets[batch]).square().mean()
        return loss, loss

    return loss_of


def test_it_takes_the_steps_of_adamw_in_order():
    torch.manual_seed(0)
    targets, start = torch.randn(6, 3), torch.randn(3)
    mine, reference = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    spans = [slice(0, 2), slice(2, 4), slice(4, 6)]
    means = descend([Group([mine], 0.05, 0.1)], quadratic(mine, targets), spans, 4, lambda *_: None, "it")
    optimizer = torch.optim.AdamW([reference], lr=0.05, weight_decay=0.1)
    expected = []
    for _ in range(4):
        losses = []
        for span in spans:
            optimizer.zero_grad()
            loss = quadratic(reference, targets)(span)[0]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected.append(sum(losses) / 3)
    torch.testing.assert_close(mine, reference)
    assert means == pytest.approx(expected, rel=1e-5)


def test_a_bad_epoch_is_taken_back_and_run_at_half_the_rate():
    parameter, rates = nn.Parameter(torch.ones(1)), []

    def loss_of(batch):
        # a cliff: beyond 1.35 the loss is not a number
        loss = torch.where(parameter > 1.35, torch.nan, -parameter).sum()
        rates.append(parameter.item())
        return loss, loss

    means = descend([Group([parameter], 0.4, 0.0)], loss_of, [slice(0, 1)] * 3, 1, lambda *_: None, "it")
    assert means[0] == means[0]
    assert 1.0 < parameter.item() < 1.35
    assert rates.count(1.0) == 3  # at 0.4, at 0.2, at 0.1


def test_a_hopeless_loss_is_refused_with_where_and_what_to_change():
    parameter = nn.Parameter(torch.ones(1))

    def loss_of(batch):
        return parameter.sum() * torch.nan, parameter.sum() * torch.nan

    with pytest.raises(ApiqError, match=r"block 7 is not finite in epoch 1.*lr_theta"):
        descend([Group([parameter], 0.1, 0.0)], loss_of, [slice(0, 1)], 1, lambda *_: None, "block 7")
    assert torch.equal(parameter.detach(), torch.ones(1))
