"""The best A and B for a given Q, in closed form: reduced-rank regression.

Shapes: W and Q (out, in) as in nn.Linear; A (in, r) and B (out, r) as in the paper, so that the linear
computes X Q^T + X A B^T. Of the activations X (tokens, in) of the full-precision model and Xq
(tokens, in) of the quantized one only the second moments G = Xq^T Xq and M = Xq^T X, both (in, in),
are needed, with any common factor. Everything is computed in the dtype of the arguments.

With G = L L^T (Cholesky), || Xq R - Y || differs from || L^T R - L^-1 Xq^T Y || by a constant, so the best R of
rank r is L^-T times the truncated singular value decomposition of L^-1 Xq^T Y (Izenman 1975, doi
10.1016/0047-259X(75)90042-1). Where it need not be `exact` the decomposition is a randomized one (Halko, Martinsson and
Tropp, arXiv 0909.4061), whose time grows with the rank instead of the width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plain(W: Tensor, Q: Tensor, rank: int, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Minimise || W - Q - B A^T || (Frobenius): LoftQ (arXiv 2310.08659, algorithm 1) with T = 1."""
    return _factors((W - Q).t(), rank, exact)


def whitened(W: Tensor, Q: Tensor, G: Tensor, rank: int, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Minimise || Xq (W - Q - B A^T)^T ||: QERA-exact (arXiv 2410.06040).

    Raises:
        torch.linalg.LinAlgError: G is not positive definite.
    """
    L = torch.linalg.cholesky(G)
    A, B = _factors(L.t() @ (W - Q).t(), rank, exact)
    return _unwhitened(L, A), B


def asymmetric(W: Tensor, Q: Tensor, G: Tensor, M: Tensor, rank: int, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Minimise || X W^T - Xq (Q + B A^T)^T ||: the objective of ApiQ-lw (equation 4) for fixed Q.

    Raises:
        torch.linalg.LinAlgError: G is not positive definite.
    """
    L = torch.linalg.cholesky(G)
    C = M @ W.t() - G @ Q.t()
    A, B = _factors(torch.linalg.solve_triangular(L, C, upper=False), rank, exact)
    return _unwhitened(L, A), B


def weighted(W: Tensor, Q: Tensor, rows: Tensor, columns: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Minimise || D_r (W - Q - B A^T) D_c || for D_r = diag(rows) (out), D_c = diag(columns) (in), all positive.

    LQ-LoRA (arXiv 2311.12023), section 3.3: the problem stays a truncated singular value decomposition.
    """
    A, B = _factors((rows[:, None] * (W - Q) * columns).t(), rank, exact=True)
    return A / columns[:, None], B / rows[:, None]


def _factors(P: Tensor, rank: int, exact: bool) -> tuple[Tensor, Tensor]:
    """U sqrt(S) and V sqrt(S) of the `rank` largest singular values of P = U S V^T."""
    looked_at = 2 * rank
    if exact or looked_at >= min(P.shape):
        U, S, Vh = torch.linalg.svd(P, full_matrices=False)
        V = Vh.t()
    else:
        with torch.random.fork_rng([P.device] if P.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(P, looked_at, niter=4)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, V[:, :rank] * root


def _unwhitened(L: Tensor, A: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L.t(), A, upper=True)
