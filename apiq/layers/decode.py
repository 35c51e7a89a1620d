"""Y = X Q^T + bias for a few rows of X, from the packed codes, in one Triton kernel: Q is only ever in registers.

One new token reads every weight once, so its time is that of reading them. The plain path reads the codes, writes Q
and reads it again; here 2 bits cost 2 bits of traffic. Q is rounded to the precision of X, as on the plain path,
and the sums are kept in float32, so the two differ by the order of summation alone.

Import this module only where Triton is installed.
"""

# A kernel's `constexpr` is a plain number to whoever calls it, and inside it; Triton's types say otherwise.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS = 8
"""Rows of Q that one program computes."""
INPUTS = 1024
"""Columns of Q that a program holds at a time."""


def decode(
    X: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    width: int,
    balanced: bool = False,
) -> Tensor:
    """Y (rows, out) in the dtype of X.

    Args:
        X: (rows, in), float32, float16 or bfloat16; one pass over the codes serves all rows, so they should be few.
        codes: packed, int32 (out, ceil(in b / 32)).
        scales: float16 (out, G).
        zeros: packed, int32 (out, ceil(G b / 32)), or None for a fixed zero point.
        bias: (out), or None.
        bits: b, which is 2, 3 or 4.
        width: weights a group; the last group may be shorter.
        balanced: whether the fixed zero point is 2^(b-1) - 1/2 and not 2^(b-1).
    """
    X, codes, scales = X.contiguous(), codes.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    rows, in_features = X.shape
    out_features, groups = scales.shape
    run = 16 if bits == 2 else 8
    Y = torch.empty(rows, out_features, dtype=X.dtype, device=X.device)
    with torch.cuda.device_of(X):  # Triton launches on the current device
        _decode[(triton.cdiv(out_features, OUTPUTS),)](
            X, codes, scales, zeros, bias, Y, rows, out_features, in_features, groups, width, codes.shape[1],
            0 if zeros is None else zeros.shape[1],
            BITS=bits, RUN=run, RUNS=INPUTS // run, WHOLE_RUNS=groups == 1 or width % run == 0,
            BALANCED=balanced, ROWS=triton.next_power_of_2(rows), OUTPUTS=OUTPUTS,
        )  # fmt: skip
    return Y


@triton.jit
def _number(row, index, there, BITS: tl.constexpr):
    """Number `index` of the rows of words that begin at `row`, 0 where not `there`; it may straddle two words."""
    first, shift = index * BITS // 32, index * BITS % 32
    number = tl.load(row + first, mask=there, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        rest = tl.load(row + first + 1, mask=there & (shift + BITS > 32), other=0).to(tl.uint32, bitcast=True)
        number = number | (rest << ((32 - shift) & 31))
    return (number & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _decode(
    X, codes, scales, zeros, bias, Y, rows, out_features, in_features, groups, width, code_words, zero_words,
    BITS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, WHOLE_RUNS: tl.constexpr, BALANCED: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """OUTPUTS columns of Y. Columns of Q come in runs of RUN; with WHOLE_RUNS no run lies in two groups."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    o = output.to(tl.int64)[:, None, None]
    place = tl.arange(0, RUN)[None, None, :]
    token = tl.arange(0, ROWS)[None, :]
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for start in range(0, tl.cdiv(in_features, RUN), RUNS):
        run = start + tl.arange(0, RUNS)[None, :, None]
        column = run * RUN + place
        if BITS * RUN == 32:  # a run is a word, which is loaded once
            word = tl.load(codes + o * code_words + run, mask=(o < out_features) & (run < code_words), other=0)
            number = (word >> (place * BITS)) & ((1 << BITS) - 1)
        else:
            number = _number(codes + o * code_words, column, (o < out_features) & (column < in_features), BITS)
        group = (run * RUN if WHOLE_RUNS else column) // width
        grouped = (o < out_features) & (group < groups)
        s = tl.load(scales + o * groups + group, mask=grouped, other=0.0).to(tl.float32)
        z = 1 << (BITS - 1) if zeros is None else _number(zeros + o * zero_words, group, grouped, BITS)
        steps = (number - z).to(tl.float32)
        if BALANCED:
            steps += 0.5
        Q = (s * steps).to(X.dtype.element_ty).to(tl.float32)
        for row in tl.static_range(ROWS):
            x = tl.load(X + row * in_features + column, mask=(column < in_features) & (row < rows), other=0.0)
            part = tl.sum(tl.sum(Q * x.to(tl.float32), axis=2), axis=1)
            total += tl.where(token == row, part[:, None], 0.0)
    if bias is not None:
        total += tl.load(bias + output, mask=output < out_features, other=0.0).to(tl.float32)[:, None]
    target = Y + token * out_features + output[:, None]
    tl.store(target, total.to(Y.dtype.element_ty), mask=(token < rows) & (output[:, None] < out_features))
