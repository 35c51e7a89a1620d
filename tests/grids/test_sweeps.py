"""The pieces of the fake quantizer against the whole, and what is compiled against what is not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.grids import compiled, sweeps
from apiq.grids.affine import Grid, decode, encode, extrema, grouped, scale_and_zero
from apiq.grids.levels import TERNARY

SHAPES = [(5, 100), (64, 64), (3, 7), (1, 130)]


def case(shape, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    low, high = extrema(W, grid)
    s, z = scale_and_zero(0.7 * low, 0.8 * high, grid)
    return W, s, z, torch.randn(shape, generator=generator)


def swept(dtype, grad, *rest):
    """Q and the gradients of W and s; Q again, made together with the gradient of s."""
    Q = torch.empty_like(grad, dtype=dtype)
    both = sweeps.dequantized_and_scale_gradient(grad, *rest, Q)
    parts = sweeps.dequantized(*rest, dtype), sweeps.weight_gradient(grad, *rest), sweeps.scale_gradient(grad, *rest)
    assert torch.equal(Q, parts[0])
    torch.testing.assert_close(both, parts[2], rtol=1e-5, atol=1e-5)
    return *parts, both


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
@pytest.mark.parametrize("width", [32, 40])
def test_what_is_compiled_is_one_graph_with_the_same_result(width, symmetric, monkeypatch):
    """The last group of 40 is short, so nothing is compiled there."""
    W, s, z, grad = case((6, 96), Grid(2, width, symmetric))
    rest = (s, z, 3, symmetric == "balanced", width)
    made = []

    def compiling(function):
        made.append(function)
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    plain = swept(torch.float32, grad, W, *rest)
    monkeypatch.setattr(compiled, "_compiled", compiling)
    monkeypatch.setattr(compiled, "_has_cpp_compiler", lambda: True)
    with compiled.many(compiled.MANY):
        again = swept(torch.float32, grad, W, *rest)
        assert len(made) == (4 if width == 32 else 0)
        transposed = swept(torch.float32, grad, W.t().contiguous().t(), *rest)
    assert len(made) == (4 if width == 32 else 0), "the columns of GPT-2 are swept piece by piece"
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    for one, other in zip(plain, transposed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


def test_little_work_or_no_compiler_means_that_nothing_is_compiled(monkeypatch):
    W = torch.ones(2, 2)
    monkeypatch.setattr(compiled, "_has_cpp_compiler", lambda: True)
    with compiled.many(compiled.MANY - 1):
        assert not compiled.pays(W)
    with compiled.many(compiled.MANY):
        assert compiled.pays(W)
        with compiled.many(0):
            assert compiled.pays(W)
    monkeypatch.setattr(compiled, "_has_cpp_compiler", lambda: False)
    with compiled.many(compiled.MANY):
        assert not compiled.pays(W)


@pytest.mark.slow
def test_a_compiler_that_answers_but_does_not_compile_is_none(tmp_path):
    asked = compiled._has_cpp_compiler.__wrapped__
    assert asked(), "this machine has one"
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\ntest "$1" = --version && exec g++ --version\necho no Python.h >&2; exit 1\n')
    broken.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(broken))}):
        torch._dynamo.reset()
        assert not asked()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiler_of_this_machine_makes_the_same_weight_and_sums_to_rounding(dtype):
    W, s, z, grad = case((96, 1024), Grid(2, 64, False))
    W, grad, rest = W.to(dtype), grad.to(dtype), (s, z, 3, False, 64)
    plain = swept(dtype, grad, W, *rest)
    with compiled.many(compiled.MANY):
        again = swept(dtype, grad, W, *rest)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
    torch.testing.assert_close(again[2], plain[2], rtol=1e-5, atol=1e-5)
