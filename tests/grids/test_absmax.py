"""Rounding of small matrices: within half a step, settled after once, with the gradient of the identity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.grids.absmax import GROUP, decode, encode, rounded


@given(
    bits=st.sampled_from([4, 8]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 80)),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_every_entry_is_within_half_a_step_and_stays_there(bits, shape, scale, seed):
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    codes, scales = encode(x, bits)
    assert codes.shape == (-(-x.numel() // GROUP), GROUP) and scales.dtype == torch.bfloat16
    assert int(codes.max()) <= 2**bits - 2
    step = scales.float().repeat_interleave(GROUP)[: x.numel()].view(shape)
    value = decode(codes, scales, bits, x.shape)
    assert bool(((value - x).abs() <= 0.501 * step).all())
    assert torch.equal(rounded(value, bits), value)


def test_zeros_stay_zeros():
    assert not rounded(torch.zeros(3, 70), 4).any()


def test_the_gradient_is_that_of_the_identity():
    x = torch.randn(5, 40, requires_grad=True)
    (rounded(x, 4) * torch.arange(200.0).view(5, 40)).sum().backward()
    assert torch.equal(x.grad, torch.arange(200.0).view(5, 40))


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.2)])
def test_the_error_of_normal_numbers(bits, most):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert float((rounded(x, bits) - x).square().mean().sqrt()) < most
