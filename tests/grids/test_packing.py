"""Packing is dense and loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.grids.levels import TERNARY, levels
from apiq.grids.packing import pack, unpack, words


@given(
    bits=st.sampled_from([*range(1, 9), TERNARY]), rows=st.integers(1, 5), columns=st.integers(1, 140),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_round_trip(bits, rows, columns, seed):
    codes = torch.randint(0, levels(bits), (rows, columns), generator=torch.Generator().manual_seed(seed))
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


@given(columns=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_ternary_codes_are_the_digits_of_bytes_five_by_five(columns, seed):
    codes = torch.randint(0, 3, (1, columns), generator=torch.Generator().manual_seed(seed))
    digits = "".join(map(str, codes[0].tolist()))
    numbers = [int(digits[start : start + 5][::-1], 3) for start in range(0, columns, 5)]
    assert pack(codes, TERNARY)[0].numpy().tobytes().rstrip(b"\0") == bytes(numbers).rstrip(b"\0")


def test_three_bits_cost_three_bits_and_ternary_codes_one_and_six_tenths():
    assert words(4096, 3) * 32 == 4096 * 3
    assert words(4000, TERNARY) * 32 == 4000 * 1.6
    assert [words(columns, TERNARY) for columns in (1, 20, 21)] == [1, 1, 2]


@pytest.mark.parametrize("code", [-1, 4])
@pytest.mark.parametrize(("bits", "top"), [(2, 3), (TERNARY, 2)])
def test_a_code_that_does_not_fit_is_refused(code, bits, top):
    with pytest.raises(ValueError, match=rf"0 \.\. {top}"):
        pack(torch.tensor([[0, code]]), bits)
