"""GPTQ is its definition, column by column in double precision, however its columns are taken in blocks."""

import copy

import pytest
import torch

from apiq.blocks.walk import deploy
from apiq.grids.affine import Grid, decode, encode, extrema, scale_and_zero
from apiq.methods import build, gptq
from apiq.methods.gptq import error_feedback, output_error
from apiq.methods.moments import damped
from apiq.params import QuantizeParams


def layer(width=40, out=6, tokens=100):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    W = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return W, damped(X.t() @ X / tokens, 0.01)


def by_definition(W, H, grid, act_order):
    """Optimal brain quantization in a fixed order (equation 2): invert the Hessian of what is left at every step."""
    W, one, width = W.clone(), Grid(grid.bits, 0, grid.symmetric), grid.width(W.shape[1])
    columns = list(range(W.shape[1]))
    if act_order:
        columns.sort(key=lambda column: -float(H[column, column]))
    original, codes, ranges = W.clone(), torch.empty(W.shape, dtype=torch.uint8), {}
    for step, column in enumerate(columns):
        group = column // width
        if group not in ranges:
            weights = original if act_order else W
            ranges[group] = scale_and_zero(*extrema(weights[:, group * width : (group + 1) * width], one), one)
        s, z = ranges[group]
        code = encode(W[:, [column]], s, z, one)
        codes[:, [column]] = code
        left = columns[step:]
        inverse = torch.linalg.inv(H[left][:, left])
        error = (W[:, [column]] - decode(code, s, z, one)) / inverse[0, 0]
        W[:, left] -= error * inverse[0]
    order = sorted(ranges)
    return codes, torch.cat([ranges[g][0] for g in order], 1), torch.cat([ranges[g][1] for g in order], 1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("lazy", [4, 16, 128])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(2, 8, False),
        Grid(3, 7, True),
        Grid(2, 0, False),
        Grid(4, 24, False),
        Grid(1, 7, "balanced"),
        Grid(1.58, 7, True),
    ],
    ids=str,
)
def test_it_equals_its_definition(monkeypatch, grid, lazy, act_order):
    monkeypatch.setattr(gptq, "LAZY", lazy)
    W, H = layer()
    codes, s, z = error_feedback(W, H, grid, act_order)
    expected = by_definition(W, H, grid, act_order)
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close(s, expected[1])
    assert torch.equal(z, expected[2])


@pytest.mark.parametrize("columns", [1, 7, 128, 300])
@pytest.mark.parametrize("width", [1, 3, 64, 128, 200, 300])
def test_spans_cover_the_columns_and_cut_no_group_that_fits(columns, width):
    spans = list(gptq._spans(columns, min(width, columns)))
    assert [c for span in spans for c in range(span.start, span.stop)] == list(range(columns))
    for span in spans:
        assert span.stop - span.start <= gptq.LAZY
        first, last = span.start // width, (span.stop - 1) // width
        assert span.start % width == 0 or first == last


def test_without_correlations_it_is_rounding_to_nearest():
    W, _ = layer()
    grid = Grid(2, 8, False)
    codes, *_ = error_feedback(W, torch.eye(40, dtype=torch.float64), grid)
    assert torch.equal(codes, encode(W, *scale_and_zero(*extrema(W, grid), grid), grid))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_of_the_output_than_rounding_to_nearest(bits, act_order):
    W, H = layer()
    grid = Grid(bits, 8, False)
    s, z = scale_and_zero(*extrema(W, grid), grid)
    rounding = output_error(W - decode(encode(W, s, z, grid), s, z, grid), H)
    found = error_feedback(W, H, grid, act_order)
    assert output_error(W - decode(*found, grid), H) < 0.8 * rounding


def test_the_output_error_is_that_of_the_tokens():
    X, D = torch.randn(50, 7), torch.randn(3, 7)
    assert output_error(D, X.t() @ X / 50) == pytest.approx(float((X @ D.t()).square().mean()), rel=1e-5)


def test_a_block_loses_less_than_by_rounding(problem):
    errors = {}
    for method in ("rtn", "gptq", "gptq-lora"):
        params = QuantizeParams(method=method, bits=3, group_size=16, rank=4, batch_size=4)
        case = copy.deepcopy(problem)
        solution = build(params).solve(case)
        deploy(case.block, solution, params, torch.float32)
        errors[method] = case.error(2)
    assert errors["gptq"] < 0.9 * errors["rtn"]
    assert errors["gptq-lora"] == pytest.approx(errors["gptq"], rel=1e-4)
