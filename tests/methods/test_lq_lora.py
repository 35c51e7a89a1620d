"""LQ-LoRA is its algorithm: its turns never lose, and its weights do what they say."""

import copy

import pytest
import torch

from apiq.adapters.closed_form import plain, weighted
from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat
from apiq.methods import build
from apiq.methods.fisher import Weights, alike, separated
from apiq.methods.grid import nearest, values
from apiq.methods.lq_lora import decompose
from apiq.params import QuantizeParams

GRIDS = [NormalFloat(2, 16), NormalFloat(4, 0), Grid(2, 16, False), Grid(3, 0, True), Grid(1, 8, False)]


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def importance(out, width, seed=1):
    return separated(matrix(out, 1, seed=seed).square() * matrix(1, width, seed=seed + 1).square())


def left(W, grid, found):
    parts, (A, B), _ = found
    return W - values(*parts, grid) - B @ A.t()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_its_iterates_are_those_of_the_algorithm(grid):
    """A decomposition of W - Q, then rounding of what is left, until the error rises."""
    W = matrix(24, 40).float()
    Q, errors = torch.zeros_like(W), []
    for _ in range(6):
        U, S, V = torch.linalg.svd(W - Q, full_matrices=False)
        low = (U[:, :3] * S[:3]) @ V[:3]
        Q = values(*nearest(W - low, grid), grid)
        errors.append(float((W - Q - low).square().sum()))
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            errors.pop()
            break
    found = decompose(W, grid, 3, 6, alike(W))
    assert found[2] == pytest.approx(errors[-1], rel=1e-4)
    assert float(left(W, grid, found).square().sum()) == pytest.approx(found[2], rel=1e-4)
    assert errors == sorted(errors, reverse=True)


def test_more_turns_are_never_worse():
    W, grid = matrix(24, 40).float(), NormalFloat(2, 8)
    errors = [decompose(W, grid, 4, steps, alike(W))[2] for steps in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_the_weighted_low_rank_part_is_the_optimum():
    """Weighted alternating least squares ends where it is."""
    D, F = matrix(7, 9), importance(7, 9)

    def error(product):
        return float(F.error(D - product))

    A, B = weighted(D, torch.zeros_like(D), F.rows, F.columns, 3)
    rows, columns = F.rows.square(), F.columns.square()
    a, b = matrix(9, 3, seed=5), matrix(7, 3, seed=6)
    for _ in range(3000):
        b = torch.linalg.solve(a.t() @ (columns[:, None] * a), a.t() @ (columns[:, None] * D.t())).t()
        a = torch.linalg.solve(b.t() @ (rows[:, None] * b), b.t() @ (rows[:, None] * D)).t()
    assert error(B @ A.t()) == pytest.approx(error(b @ a.t()), rel=1e-6)
    A, B = plain(D, torch.zeros_like(D), 3)
    assert error(b @ a.t()) < error(B @ A.t())


@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_fisher_information_that_is_a_product_is_kept_exactly(scale):
    F = scale * (matrix(6, 1).square() + 0.1) * (matrix(1, 5).square() + 0.1)
    found = separated(F)
    torch.testing.assert_close(found.importance * found.rows.square()[:, None] * found.columns.square(), F)
    D = matrix(6, 5, seed=3)
    assert float(found.error(D)) == pytest.approx(float((F * D.square()).sum()))


def test_a_linear_that_no_token_reaches_costs_nothing():
    found = separated(torch.zeros(4, 6))
    assert float(found.error(matrix(4, 6).float())) == 0
    assert bool((found.rows == 1).all() and (found.columns == 1).all())


def test_weights_pull_the_error_to_where_it_is_cheap():
    W, grid = matrix(24, 40).float(), NormalFloat(2, 8)
    F = importance(24, 40)
    F = Weights(*(value.float() for value in vars(F).values()))
    plainly, by_weight = (decompose(W, grid, 6, 10, weights) for weights in (alike(W), F))
    assert float(F.error(left(W, grid, by_weight))) < 0.9 * float(F.error(left(W, grid, plainly)))


def settings(**values):
    return QuantizeParams(**{"method": "lq-lora", "bits": 2, "group_size": 16, "rank": 4, **values})


def test_it_is_nearer_to_the_weights_than_one_step_of_loftq(problem):
    errors = {}
    for method in ("lq-lora", "loftq"):
        params = settings(method=method, loftq={"steps": 1}, lq_lora={"double_quantization": False})
        solution = build(params).solve(copy.deepcopy(problem))
        total = 0.0
        for name, module in problem.linears().items():
            A, B = (solution.adapters[f"{name}.lora_{part}.weight"] for part in "AB")
            total += float((module.weight - solution.linears[name].dequantized() - 4.0 * B @ A).square().sum())
        errors[method] = total
    assert errors["lq-lora"] < errors["loftq"]


def test_fisher_weights_need_windows():
    params = settings(lq_lora={"weights": "fisher"})
    assert params.calibrated and build(params).calibrated
    assert not settings().calibrated
    with pytest.raises(ValueError, match=r"candidate_bits\|\[1, 2\]\|2 to 4 for these levels"):
        settings(target_bits=2.0, candidate_bits=[1, 2])
