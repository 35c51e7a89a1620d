"""LoftQ is its algorithm: peft's decomposition and rounding by turns, and no step loses on one step of it."""

import sys
import types

import pytest
import torch
from peft.utils import loftq_utils
from peft.utils.loftq_utils import _low_rank_decomposition, loftq_init
from torch import nn

from apiq.grids.affine import Grid, extrema, fake_quantize, scale_and_zero
from apiq.grids.normal_float import NormalFloat, decode, encode, scales
from apiq.methods.loftq import alternate


def layer(out=24, width=64):
    linear = nn.Linear(width, out, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out, width, generator=torch.Generator().manual_seed(0)))
    return linear


def quantized(W, grid):
    if isinstance(grid, NormalFloat):
        s = scales(W, grid)
        return decode(encode(W, s, grid), s, grid)
    return fake_quantize(W, *scale_and_zero(*extrema(W, grid), grid), grid)


GRIDS = [NormalFloat(2, 32), NormalFloat(4, 0), Grid(2, 16, False), Grid(3, 0, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_its_iterates_are_those_of_peft(grid, steps):
    linear = layer()
    W, residual = linear.weight.detach(), linear.weight.detach()
    for _ in range(steps):  # the loop of peft.utils.loftq_utils.loftq_init, on our grids
        Q = quantized(residual, grid)
        parts = _low_rank_decomposition(W - Q, 4)
        residual = W - parts["L"] @ parts["R"]
    packed, (A, B) = alternate(linear, grid, 4, steps)
    torch.testing.assert_close(packed.dequantized(), Q, rtol=2**-11, atol=1e-6)
    torch.testing.assert_close(B @ A.t(), parts["L"] @ parts["R"], rtol=1e-4, atol=1e-5)


class Placed(torch.Tensor):
    """A tensor that stays on the CPU, wherever it is sent: peft's loop sends it to an accelerator."""

    def to(self, *args, **kwargs):
        return self


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_loop_of_peft(monkeypatch, steps):
    """Peft's `loftq_init` itself; only the 4-bit rounding, for which it calls bitsandbytes on a GPU, is ours."""
    grid = NormalFloat(4, 64)
    rounding = types.ModuleType("bitsandbytes")
    rounding.nn = types.SimpleNamespace(
        Params4bit=lambda W, **kwargs: quantized(W.as_subclass(torch.Tensor), grid).as_subclass(Placed)
    )
    rounding.functional = types.SimpleNamespace(dequantize_4bit=lambda Q, state: Q.as_subclass(Placed))
    monkeypatch.setattr(torch.Tensor, "quant_state", None, raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", rounding)
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        monkeypatch.setattr(loftq_utils, name, lambda: True)
    monkeypatch.setattr(loftq_utils, "is_xpu_available", lambda: False)
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    linear = layer()
    Q, right, left = loftq_init(linear.weight.detach().as_subclass(Placed), 4, 4, steps)
    packed, (A, B) = alternate(linear, grid, 4, steps)
    torch.testing.assert_close(packed.dequantized(), Q.as_subclass(torch.Tensor), rtol=2**-11, atol=1e-6)
    torch.testing.assert_close(B @ A.t(), (left @ right).as_subclass(torch.Tensor), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_adapters_bring_the_sum_nearer_to_the_weight_than_rounding(grid):
    linear = layer()
    packed, (A, B) = alternate(linear, grid, 4, 1)
    W = linear.weight.detach()
    left = W - packed.dequantized()
    singular = torch.linalg.svdvals(left)
    assert float((left - B @ A.t()).norm()) == pytest.approx(float(singular[4:].norm()), rel=1e-3)
