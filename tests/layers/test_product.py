"""The product with a fake-quantized weight against autograd on its parts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apiq.grids.affine import Grid
from apiq.layers import product as module
from apiq.layers.fake_quant import FakeQuantLinear


def linear(group=32, symmetric=False, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    fake = FakeQuantLinear(nn.Linear(100, 24, bias=bias, dtype=dtype), Grid(2, group, symmetric))
    with torch.no_grad():
        fake.gamma.uniform_(-1, 4)
        fake.beta.uniform_(-1, 4)
    return fake


def gradients(fake, x, output):
    output.square().sum().backward()
    parameters = [x, fake.gamma, fake.beta] + ([] if fake.shift is None else [fake.shift])
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("group", [0, 32, 43])
@pytest.mark.parametrize("symmetric", [False, True, "balanced"])
@pytest.mark.parametrize("rows", [1, 700, 2**20])
@pytest.mark.parametrize("moving", [False, True])
def test_output_and_gradients_equal_those_of_the_differentiable_weight(group, symmetric, rows, moving, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    fake = linear(group, symmetric)
    if moving:
        fake.train_weight()
        fake.shift.data.normal_()
    x = torch.randn(2, 5, 100, requires_grad=True)
    plain = F.linear(x, fake.weight, fake.bias)
    assert torch.equal(fake(x), plain)
    for mine, expected in zip(gradients(fake, x, fake(x)), gradients(fake, x, plain), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_what_the_plain_linear_computes_in_it(dtype):
    fake = linear(dtype=dtype)
    x = torch.randn(3, 100, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        mine, plain = fake(x), F.linear(x, fake.weight, fake.bias)
    assert mine.dtype == dtype
    assert torch.equal(mine, plain)
    for one, other in zip(gradients(fake, x, mine.float()), gradients(fake, x, plain.float()), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_a_weight_moves_in_units_of_its_scales_by_the_straight_through_gradient():
    fake = linear(dtype=torch.bfloat16)
    s, z = fake.scale_and_zero()
    fake.train_weight()
    fake.shift.data.normal_(std=2)
    units = s.detach().repeat_interleave(32, 1)[:, :100]
    moved = fake.full_weight.float() + units * fake.shift
    assert torch.equal(fake.shifted, moved)
    free = (moved / units).round() + z.repeat_interleave(32, 1)[:, :100]
    fake.weight.sum().backward()
    assert torch.equal(fake.shift.grad, units * ((free >= 0) & (free <= 3)))
    packed = fake.packed()
    assert torch.equal(packed.dequantized(), fake.weight) and packed.dequantized().dtype == torch.bfloat16


def test_nothing_of_the_size_of_the_weight_is_kept_but_the_weight_itself():
    fake, kept = linear(), []
    x = torch.randn(1, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake(x)
    large = {t.data_ptr() for t in kept if t.numel() >= 24 * 100}
    assert large == {fake.full_weight.data_ptr()}


def test_no_tokens_give_no_gradient():
    fake = linear()
    fake(torch.randn(0, 100, requires_grad=True)).sum().backward()
    assert not fake.gamma.grad.any() and not fake.beta.grad.any()


def test_a_frozen_range_gets_no_gradient_and_a_trained_bias_gets_its_own():
    fake = linear()
    fake.gamma.requires_grad_(False)
    fake.beta.requires_grad_(False)
    x = torch.randn(7, 100, requires_grad=True)
    fake(x).sum().backward()
    assert fake.gamma.grad is None
    torch.testing.assert_close(fake.bias.grad, torch.full((24,), 7.0))
    torch.testing.assert_close(x.grad, fake.weight.sum(0).expand(7, 100))


def test_it_runs_without_data():
    with torch.device("meta"):
        fake = FakeQuantLinear(nn.Linear(100, 24), Grid(2, 43, False))
        fake(torch.randn(2, 100, requires_grad=True)).sum().backward()
    assert fake.gamma.grad.shape == (24, 3)


def test_the_range_fitted_to_the_weight_is_closer_to_it_than_the_whole_range():
    fake = linear()
    with torch.no_grad():
        fake.gamma.fill_(9.0)
        fake.beta.fill_(9.0)
        whole = (fake.weight - fake.full_weight).square().sum()
        fake.fit_range()
        assert (fake.weight - fake.full_weight).square().sum() < 0.9 * whole
