"""The pieces of the fake quantizer against the whole, and what is compiled against what is not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.grids import sweeps
from apiq.grids.affine import Grid, decode, encode, extrema, grouped, scale_and_zero
from apiq.grids.levels import TERNARY

SHAPES = [(5, 100), (64, 64), (3, 7), (1, 130)]


def case(shape, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    low, high = extrema(W, grid)
    s, z = scale_and_zero(0.7 * low, 0.8 * high, grid)
    return W, s, z, torch.randn(shape, generator=generator)


@given(
    shape=st.sampled_from(SHAPES),
    width=st.sampled_from([0, 1, 7, 32, 43, 500]),
    kind=st.sampled_from([(3, False), (3, True), (3, "balanced"), (TERNARY, True)]),
    piece=st.sampled_from([1, 60, 257, 2**16]),
)
def test_pieces_of_any_size_give_what_the_equations_give(shape, width, kind, piece):
    grid = Grid(kind[0], width, kind[1])
    W, s, z, grad = case(shape, grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "PIECE", piece)
        Q = sweeps.dequantized(W, s, z, grid.top, grid.balanced, grid.width(shape[1]), torch.float32)
        mine = sweeps.scale_gradient(grad, W, s, z, grid.top, grid.balanced, grid.width(shape[1]))
    assert torch.equal(Q, decode(encode(W, s, z, grid), s, z, grid))
    ratio = grouped(W, grid).double() / s.unsqueeze(-1)
    free = ratio.floor() + grid.top / 2 + 0.5 if grid.balanced else ratio.round() + z.unsqueeze(-1)
    slope = torch.where((free >= 0) & (free <= grid.top), free - z.unsqueeze(-1) - ratio, 0.0)
    slope = slope.where((free >= 0) & (free <= grid.top), free.clamp(0, grid.top) - z.unsqueeze(-1))
    upstream = torch.zeros_like(slope).flatten(1)
    upstream[:, : shape[1]] = grad
    torch.testing.assert_close(mine, (slope * upstream.view_as(slope)).sum(-1).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, "balanced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_weight_of_float32(dtype, symmetric):
    grid = Grid(2, 43, symmetric)
    W, s, z, _ = case((6, 100), grid)
    exact = sweeps.dequantized(W, s, z, grid.top, grid.balanced, 43, torch.float32)
    assert torch.equal(sweeps.dequantized(W, s, z, grid.top, grid.balanced, 43, dtype), exact.to(dtype))
    coarse = W.to(dtype)
    assert torch.equal(
        sweeps.dequantized(coarse, s, z, grid.top, grid.balanced, 43, torch.float32),
        sweeps.dequantized(coarse.float(), s, z, grid.top, grid.balanced, 43, torch.float32),
    )


@pytest.mark.parametrize("symmetric", [False, "balanced"])
@pytest.mark.parametrize("name", ["_dequantized", "_scale_gradient"])
def test_the_functions_that_are_compiled_for_a_gpu_are_one_graph_with_the_same_result(name, symmetric):
    function = getattr(sweeps, name)
    W, s, z, grad = case((6, 96), Grid(2, 32, symmetric))
    parts = [V.view(6, 3, 32) for V in ((W,) if name == "_dequantized" else (grad, W))]
    operands = (*parts, s[..., None], z[..., None], 3, symmetric == "balanced")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(*operands), function(*operands))
