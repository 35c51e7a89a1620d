"""The closed forms are the optima that alternating least squares finds, in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiq.adapters.closed_form import asymmetric, plain, whitened

RANK = 3


def case(seed, width=9, out=7, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    X = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing
    Xq = X + 0.3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    W = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return W, W.round(), X, Xq


def alternating_least_squares(Xq, Y, rank):
    """Minimise || Y - Xq A B^T || by solving for A and for B in turn, until nothing moves any more."""
    G, C = Xq.t() @ Xq, Xq.t() @ Y
    fitted = torch.linalg.solve(G, C)
    B, last = torch.randn(Y.shape[1], rank, generator=torch.Generator().manual_seed(1), dtype=Y.dtype), None
    for _ in range(20000):
        A = fitted @ B @ torch.linalg.inv(B.t() @ B)
        B = C.t() @ A @ torch.linalg.inv(A.t() @ G @ A)
        if last is not None and (A @ B.t() - last).norm() < 1e-13 * last.norm():
            break
        last = A @ B.t()
    return A, B


def forms(W, Q, X, Xq):
    """Closed form and the regression (inputs, outputs) that it solves, for each of the three."""
    G, M = Xq.t() @ Xq, Xq.t() @ X
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    return {
        "plain": (plain(W, Q, RANK), eye, (W - Q).t()),
        "whitened": (whitened(W, Q, G, RANK), Xq, Xq @ (W - Q).t()),
        "asymmetric": (asymmetric(W, Q, G, M, RANK), Xq, X @ W.t() - Xq @ Q.t()),
    }


@pytest.mark.parametrize("form", ["plain", "whitened", "asymmetric"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_alternating_least_squares_converges_to(form, seed):
    (A, B), inputs, Y = forms(*case(seed))[form]
    A_slow, B_slow = alternating_least_squares(inputs, Y, RANK)
    error, slow = ((Y - inputs @ a @ b.t()).norm() for a, b in ((A, B), (A_slow, B_slow)))
    assert float(error) == pytest.approx(float(slow), rel=1e-6)
    torch.testing.assert_close(A @ B.t(), A_slow @ B_slow.t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [plain, whitened, asymmetric])
def test_the_randomized_one_is_nearly_as_good_and_the_same_every_time(form):
    W, Q, X, Xq = case(0, width=60, out=50, tokens=400)
    moments = {plain: [], whitened: [Xq.t() @ Xq], asymmetric: [Xq.t() @ Xq, Xq.t() @ X]}[form]
    inputs = torch.eye(60, dtype=W.dtype) if form is plain else Xq
    Y = (X if form is asymmetric else inputs) @ W.t() - inputs @ Q.t()
    found = [form(W, Q, *moments, RANK, exact) for exact in (True, False, False)]
    best, rough, again = (float((Y - inputs @ A @ B.t()).norm()) for A, B in found)
    assert best < rough < 1.02 * best
    assert rough == again and torch.equal(found[1][0], found[2][0])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from(["plain", "whitened", "asymmetric"]))
def test_no_step_away_from_it_is_better(seed, form):
    (A, B), inputs, Y = forms(*case(seed))[form]
    best = (Y - inputs @ A @ B.t()).norm()
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-1, 1e-3):
        dA, dB = (size * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (A, B))
        assert (Y - inputs @ (A + dA) @ (B + dB).t()).norm() >= best * (1 - 1e-12)


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_a_common_factor_of_the_moments_changes_nothing(factor):
    W, Q, X, Xq = case(0)
    G, M = Xq.t() @ Xq, Xq.t() @ X
    for one, other in (
        (whitened(W, Q, G, RANK), whitened(W, Q, factor * G, RANK)),
        (asymmetric(W, Q, G, M, RANK), asymmetric(W, Q, factor * G, factor * M, RANK)),
    ):
        torch.testing.assert_close(one[0] @ one[1].t(), other[0] @ other[1].t())


def test_the_forms_agree_where_their_objectives_do():
    W, Q, X, _ = case(0)
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    G = X.t() @ X
    for one, other in (
        (plain(W, Q, RANK), whitened(W, Q, eye, RANK)),
        (whitened(W, Q, G, RANK), asymmetric(W, Q, G, G, RANK)),
    ):
        torch.testing.assert_close(one[0] @ one[1].t(), other[0] @ other[1].t())


def test_at_full_rank_the_least_squares_solution_is_left():
    W, Q, X, Xq = case(0)
    A, B = asymmetric(W, Q, Xq.t() @ Xq, Xq.t() @ X, 7)
    torch.testing.assert_close(Q + B @ A.t(), torch.linalg.lstsq(Xq, X @ W.t()).solution.t())


def test_moments_without_full_rank_are_refused():
    W, Q, X, Xq = case(0, tokens=4)
    with pytest.raises(torch.linalg.LinAlgError):
        asymmetric(W, Q, Xq.t() @ Xq, Xq.t() @ X, RANK)
