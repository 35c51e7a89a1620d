"""NormalFloat levels are the published ones, and codes and 8-bit scales are those of the nearest level."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.grids import double_quantization, normal_float
from apiq.grids.normal_float import NormalFloat, decode, encode, levels, scales

CPU = torch.device("cpu")
NF4 = [  # table of bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
NF2 = [-1.0, 0.0, 0.33791524171829224, 1.0]  # table of peft's NFQuantizer


@pytest.mark.parametrize(("bits", "published"), [(4, NF4), (2, NF2)])
def test_levels_are_the_published_ones(bits, published):
    torch.testing.assert_close(levels(bits), torch.tensor(published), rtol=0, atol=2e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_equally_likely_quantiles(bits):
    half, outer = 2 ** (bits - 1), torch.tensor(normal_float.OFFSET)
    p = torch.special.ndtr(levels(bits) * torch.special.ndtri(outer))
    torch.testing.assert_close(p[half:].diff(), p[half:].diff().mean().expand(half - 1))
    torch.testing.assert_close(p[:half].diff(), p[:half].diff().mean().expand(half - 1))
    assert levels(bits)[half - 1] == 0


def test_one_bit_is_refused():
    with pytest.raises(ValueError, match="2 bits or more"):
        levels(1)


@given(st.integers(0, 99), st.sampled_from([2, 3, 4]), st.sampled_from([0, 7, 16, 20]), st.booleans())
def test_every_weight_goes_to_the_nearest_level_of_its_group(seed, bits, group, double):
    W = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    grid = NormalFloat(bits, group, double=double)
    s = scales(W, grid)
    Q = decode(encode(W, s, grid), s, grid)
    for row in range(3):
        for column in range(20):
            place = s[row, column // grid.width(20)]
            distances = (place * levels(bits) - W[row, column]).abs()
            assert abs(Q[row, column] - W[row, column]) <= distances.min() + 1e-6


def test_the_largest_weight_of_a_group_is_kept():
    W = torch.tensor([[0.5, -0.25, 0.125, 0.0], [-2.0, 1.0, 0.5, 0.25]])
    grid = NormalFloat(4, 0)
    Q = decode(encode(W, scales(W, grid), grid), scales(W, grid), grid)
    assert Q[0, 0] == 0.5 and Q[1, 0] == -2.0 and Q[0, 3] == 0


def test_a_group_of_zeros_stays_zero():
    W = torch.zeros(2, 8)
    assert torch.equal(decode(encode(W, scales(W, NormalFloat(2, 4)), NormalFloat(2, 4)), torch.ones(2, 2),
                              NormalFloat(2, 4)), W)  # fmt: skip


def test_the_levels_of_scales_are_256_numbers_in_seven_decades():
    table = double_quantization.levels(CPU)
    assert len(table) == 256 and bool((table.diff() > 0).all())
    assert table[-1] == 1 and (table == 0).sum() == 1
    positive = table[table > 0][:-1]
    torch.testing.assert_close(positive, -table[table < 0].flip(0))
    for decade in range(7):
        inside = (positive > 10.0 ** (decade - 7)) & (positive < 10.0 ** (decade - 6))
        assert int(inside.sum()) == 2**decade


@given(st.integers(0, 99), st.sampled_from([(1, 1), (3, 5), (16, 16), (40, 13)]))
def test_stored_scales_are_the_nearest_that_eight_bits_hold(seed, shape):
    s = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    stored = double_quantization.store(s)
    restored = double_quantization.restore(stored)
    assert stored.codes.dtype == torch.uint8 and stored.codes.shape == restored.shape == s.shape
    assert stored.ranges.numel() == double_quantization.blocks(s.numel()) == -(-s.numel() // 256)
    table = double_quantization.levels(CPU)
    flat = s.flatten()
    for i in range(s.numel()):
        best = (stored.mean + stored.ranges[i // 256] * table - flat[i]).abs().min()
        assert abs(restored.flatten()[i] - flat[i]) <= best + 1e-7


def test_it_is_what_bitsandbytes_does():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=False)
    grid = NormalFloat(4, 64, double=True)
    s = scales(W, grid)
    torch.testing.assert_close(decode(encode(W, s, grid), s, grid), functional.dequantize_4bit(codes, state))
    table = functional.create_dynamic_map()
    torch.testing.assert_close(double_quantization.levels(CPU), table, rtol=0, atol=1e-7)
