"""One token through a packed linear beside the same through a bfloat16 one: what decoding is made of.

    python -m benchmarks.decode                                        # a GPU: widths 4096 and 11008, 2 bits, bfloat16
    TRITON_INTERPRET=1 python -m benchmarks.decode --widths 96 --copies 2    # the code at a tiny size, without a GPU

Three things take turns, each over `--copies` linears one after another, so that no cache holds the weights:
- `dense`: F.linear in bfloat16;
- `fused`: the packed linears by the Triton kernel;
- `plain`: the packed linears by the plain path, which writes the dequantized weight.
On a GPU each is recorded in a CUDA graph and replayed, as engines do, so that starting kernels from Python does not
count. In the interpreter the seconds mean nothing; what is checked is that fused and plain agree.
Writes benchmarks/results/DATE-decode-DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from apiq.grids.affine import Grid
from apiq.layers import fused
from apiq.layers.packed import PackedLinear
from benchmarks.machine import RESULTS, fastest, write

GROUP = 64


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 11008], help="inputs, of as many outputs")
    parser.add_argument("--bits", type=int, nargs="+", default=[2], choices=fused.BITS)
    parser.add_argument("--copies", type=int, default=16, help="linears one after another")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed; install apiq[kernels]")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("PyTorch sees no GPU here; TRITON_INTERPRET=1 with small --widths tries the code on the CPU")
    rows = []
    for width in chosen.widths:
        for bits in chosen.bits:
            rows.append(measure(width, bits, chosen.copies, device, chosen.rounds))
            print(rows[-1], flush=True)
    protocol = {"group_size": GROUP, "dtype": "bfloat16", "copies": chosen.copies, "rounds": chosen.rounds}
    write(f"decode-{device.type}", {"protocol": protocol, "rows": rows}, device, chosen.out)


@torch.no_grad()
def measure(width: int, bits: int, copies: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """One row: microseconds of one linear (width, width) and one token, and how much faster than dense."""
    generator = torch.Generator().manual_seed(0)
    first = random_linear(width, bits, generator).to(device)
    packed = [copy.deepcopy(first) for _ in range(copies)]
    weights = [linear.dequantized() for linear in packed]
    X = torch.randn(1, width, generator=generator).to(device, torch.bfloat16)
    if device.type == "cuda" and not fused.fits(packed[0], X):
        raise SystemExit("the kernel does not run on this GPU: the warning above says why, or it is older than Ampere.")
    works = {
        "dense": lambda: [F.linear(X, weight) for weight in weights],
        "fused": lambda: [fused.product(linear, X) for linear in packed],
        "plain": lambda: [F.linear(X, linear.dequantized()) for linear in packed],
    }
    apart = distance(works["fused"](), works["dense"]())
    replayed = {name: recorded(work) if device.type == "cuda" else work for name, work in works.items()}
    each = {name: value / copies for name, value in fastest(replayed, device, rounds).items()}
    return {
        "width": width,
        "bits": bits,
        "microseconds": {name: round(value * 1e6, 2) for name, value in each.items()},
        "times_as_fast_as_dense": {name: round(each["dense"] / each[name], 2) for name in ("fused", "plain")},
        "largest_relative_difference": apart,
    }


def random_linear(width: int, bits: int, generator: torch.Generator) -> PackedLinear:
    """A packed linear (width, width) of random codes with zero points, in bfloat16."""
    grid = Grid(bits, GROUP, symmetric=False)
    codes = torch.randint(2**bits, (width, width), generator=generator, dtype=torch.uint8)
    s = 0.01 * torch.rand(width, grid.groups(width), generator=generator) + 0.01
    z = torch.randint(2**bits, s.shape, generator=generator)
    return PackedLinear.from_codes(codes, s, z, grid, None, torch.bfloat16)


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest ||Y - Y'|| / ||Y'||."""
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(one, other, strict=True))


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph to be replayed."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


if __name__ == "__main__":
    main()
