"""The calibrating and the deployed linear are the same function, and the deployed one cannot be damaged."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from apiq.errors import ApiqError
from apiq.grids.affine import Grid
from apiq.grids.levels import TERNARY
from apiq.layers.fake_quant import FakeQuantLinear
from apiq.layers.packed import PackedLinear, asked_once

SETTINGS = list(itertools.product([1, 2, 3, 4, 8], [0, 32, 43, 64], [False, True, "balanced"], [False, True]))
SETTINGS = [setting for setting in SETTINGS if not (setting[0] == 1 and setting[2] is True)]
SETTINGS += [(TERNARY, group, True, False) for group in (0, 43)]


def pair(bits, group, symmetric, bias):
    torch.manual_seed(0)
    fake = FakeQuantLinear(nn.Linear(100, 24, bias=bias), Grid(bits, group, symmetric))
    with torch.no_grad():
        fake.gamma.uniform_(-1, 4)
        fake.beta.uniform_(-1, 4)
    return fake, fake.packed()


@pytest.mark.parametrize(("bits", "group", "symmetric", "bias"), SETTINGS)
def test_fake_and_packed_agree_bit_for_bit(bits, group, symmetric, bias):
    fake, packed = pair(bits, group, symmetric, bias)
    assert torch.equal(fake.weight, packed.dequantized())
    x = torch.randn(2, 5, 100)
    assert torch.equal(fake(x), packed(x))


def test_the_packed_state_is_all_there_is():
    fake, packed = pair(3, 43, False, True)
    assert set(packed.state_dict()) == {"codes", "scales", "zeros", "bias"}
    again = PackedLinear(100, 24, packed.grid, True, torch.float32)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again.dequantized(), fake.weight)


def test_only_the_clipping_range_learns():
    fake, _ = pair(2, 32, False, False)
    fake(torch.randn(4, 100)).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in (fake.gamma, fake.beta))
    assert not fake.full_weight.requires_grad


def test_half_precision_keeps_the_trained_scales():
    _, packed = pair(2, 32, False, False)
    before = packed.unpacked()
    packed.to(torch.bfloat16)
    assert packed.scales.dtype == torch.float16
    assert packed.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, packed.unpacked(), strict=True))


@pytest.mark.parametrize("attempt", ["weight", "data", "add"])
def test_the_weight_cannot_be_assigned_to(attempt):
    _, packed = pair(2, 32, False, False)
    with pytest.raises(ApiqError, match="cannot be merged"):
        if attempt == "weight":
            packed.weight = torch.zeros(24, 100)
        elif attempt == "data":
            packed.weight.data = torch.zeros(24, 100)
        else:
            packed.weight.data += 1


def test_the_weight_asked_for_last_is_kept_where_it_is_asked_for_often():
    (_, first), (_, second) = pair(2, 32, False, False), pair(3, 32, False, False)
    with asked_once():
        weight = first.weight
        assert first.weight is weight
        assert torch.equal(second.weight, second.dequantized())
        assert first.weight is not weight and torch.equal(first.weight, weight)
    assert first.weight is not first.weight


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_lora_is_refused(extra, safe):
    _, packed = pair(2, 32, False, False)
    model = get_peft_model(nn.Sequential(nn.LayerNorm(100), packed), LoraConfig(r=4, target_modules=["1"], **extra))
    with pytest.raises(ApiqError, match="cannot be merged"):
        model.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize("bias", [False, True])
def test_the_backward_pass_is_that_of_the_dequantized_linear(bias):
    _, packed = pair(3, 43, False, bias)
    plain = nn.Linear(100, 24, bias=bias)
    plain.weight = nn.Parameter(packed.dequantized())
    if bias:
        packed.bias.requires_grad_(True)
        plain.bias = nn.Parameter(packed.bias.detach().clone())
    x, y = (torch.randn(2, 5, 100, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    packed(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    if bias:
        torch.testing.assert_close(packed.bias.grad, plain.bias.grad)


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass():
    _, packed = pair(2, 32, False, False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        packed(torch.randn(1, 100, requires_grad=True)).sum()
    assert max(kept, default=0) < 24 * 100


def test_lora_trains_on_a_packed_linear():
    _, packed = pair(2, 32, False, False)
    model = get_peft_model(nn.Sequential(nn.LayerNorm(100), packed), LoraConfig(r=4, target_modules=["1"]))
    model(torch.randn(3, 100)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
