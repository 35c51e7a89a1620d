"""The packed linear holds a NormalFloat grid, its scales in float16 or in 8 bits."""

import pytest
import torch
from torch import nn

from apiq.grids import double_quantization
from apiq.grids.normal_float import NormalFloat, decode, encode, scales
from apiq.layers.packed import PackedLinear


def case(bits, group, double):
    linear = nn.Linear(100, 24)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(24, 100, generator=torch.Generator().manual_seed(0)))
    grid = NormalFloat(bits, group, double=double)
    s = scales(linear.weight.detach(), grid)
    codes = encode(linear.weight.detach(), s, grid)
    return PackedLinear.from_codes(codes, s, None, grid, linear.bias, torch.float32), codes, s


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [0, 32, 43])
def test_the_dequantized_weight_is_the_table_at_the_codes(bits, group):
    packed, codes, s = case(bits, group, False)
    assert torch.equal(packed.dequantized(), decode(codes, s.half().float(), packed.grid))
    assert set(packed.state_dict()) == {"codes", "scales", "bias"}


@pytest.mark.parametrize("group", [0, 32, 4])
def test_scales_in_eight_bits_are_those_that_they_restore(group):
    packed, codes, s = case(4, group, True)
    restored = double_quantization.restore(double_quantization.store(s))
    assert torch.equal(packed.unpacked()[1], restored)
    assert torch.equal(packed.dequantized(), decode(codes, restored, packed.grid))
    assert set(packed.state_dict()) == {"codes", "scales", "scale_ranges", "scale_mean", "bias"}
    assert packed.scales.dtype == torch.uint8


def test_half_precision_keeps_every_part_of_the_scales():
    packed, _, _ = case(2, 4, True)
    before = {name: value.clone() for name, value in packed.named_buffers()}
    packed.to(torch.bfloat16)
    assert packed.weight.dtype == torch.bfloat16
    for name, value in packed.named_buffers():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
