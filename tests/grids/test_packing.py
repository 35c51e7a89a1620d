"""Packing is dense and loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.grids.packing import pack, unpack, words


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 140), seed=st.integers(0, 2**31))
def test_round_trip(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes.to(torch.uint8))


@given(bits=st.integers(1, 8), columns=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_the_row_is_one_little_endian_bit_stream(bits, columns, seed):
    codes = torch.randint(0, 2**bits, (1, columns), generator=torch.Generator().manual_seed(seed))
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes[0]))
    expected = [stream >> (32 * w) & 0xFFFFFFFF for w in range(words(columns, bits))]
    assert [int(word) & 0xFFFFFFFF for word in pack(codes, bits)[0]] == expected


def test_three_bits_cost_three_bits():
    assert words(4096, 3) * 32 == 4096 * 3


@pytest.mark.parametrize("code", [-1, 4])
def test_a_code_that_does_not_fit_is_refused(code):
    with pytest.raises(ValueError, match=r"0 \.\. 3"):
        pack(torch.tensor([[0, code]]), 2)
