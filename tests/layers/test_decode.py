"""The fused kernel computes what the plain path does: on a GPU where there is one, else in Triton's interpreter."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat
from apiq.layers import fused
from apiq.layers.packed import PackedLinear

pytest.importorskip("triton")
decode = importlib.import_module("apiq.layers.decode")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 24, 100), (2, 9, 67), (3, 8, 129), (4, 1, 31), (5, 11, 64)]
BF16_STEP = 2.0**-8 if DEVICE.type == "cuda" else 2.0**-7  # the interpreter cuts where a GPU rounds


def case(grid, rows, out, columns, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(out)
    groups = grid.groups(columns)
    codes = torch.randint(grid.top + 1, (out, columns), generator=generator)
    s = 0.05 * torch.rand(out, groups, generator=generator) + 0.01
    z = None if grid.symmetric else torch.randint(grid.top + 1, (out, groups), generator=generator)
    b = torch.randn(out, generator=generator) if bias else None
    linear = PackedLinear.from_codes(codes, s, z, grid, b, dtype).to(DEVICE)
    return linear, torch.randn(rows, columns, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("symmetric", [False, True, "balanced"])
@pytest.mark.parametrize("group", [32, 43, 64, 0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_kernel_is_the_product_with_the_dequantized_weight(bits, group, symmetric, monkeypatch):
    monkeypatch.setattr(decode, "INPUTS", 64)  # a program then makes several steps
    for rows, out, columns in SHAPES:
        linear, X = case(Grid(bits, group, symmetric), rows, out, columns, bias=rows % 2 == 1)
        torch.testing.assert_close(fused.product(linear, X), F.linear(X, linear.dequantized(), linear.bias))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_weights_are_those_of_the_plain_path(bits, dtype):
    linear, X = case(Grid(bits, 43, False), 2, 24, 1100, dtype=dtype)
    Y, Q = fused.product(linear, X), linear.dequantized().double()
    assert Y.dtype == dtype
    exact = F.linear(X.double(), Q, linear.bias.double())
    bound = torch.finfo(dtype).eps * exact.abs() + 1e-4  # Y is rounded once; the sum in float32
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        bound += BF16_STEP * (X.double().abs() @ Q.abs().T + exact.abs())
    assert ((Y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [False, "balanced"])
def test_one_weight_at_a_time(symmetric):
    """With X the unit matrix, Y is Q^T, so no error can hide in a sum."""
    for bits in (2, 3, 4):
        linear, _ = case(Grid(bits, 5, symmetric), 1, 3, 16, bias=False)
        assert torch.equal(fused.product(linear, torch.eye(16, device=DEVICE)).T, linear.dequantized())


def test_the_shape_of_the_input_is_kept_and_the_memory_order_does_not_matter():
    linear, X = case(Grid(3, 32, False), 6, 24, 100)
    there = X.view(2, 3, 100).transpose(0, 1)
    torch.testing.assert_close(fused.product(linear, there), F.linear(there, linear.dequantized(), linear.bias))


SUITED = [
    ("2 bits", Grid(2, 32, False), {}, True),
    ("symmetric", Grid(4, 32, True), {}, True),
    ("balanced", Grid(2, 32, "balanced"), {}, True),
    ("8 bits", Grid(8, 32, False), {}, False),
    ("ternary", Grid(1.58, 32, True), {}, False),
    ("1 bit", Grid(1, 32, False), {}, False),
    ("NormalFloat", NormalFloat(4, 32), {}, False),
    ("another precision", Grid(2, 32, False), {"dtype": torch.bfloat16}, False),
]


@pytest.mark.parametrize(("grid", "settings", "suits"), [row[1:] for row in SUITED], ids=[row[0] for row in SUITED])
def test_which_linears_it_is_used_for(grid, settings, suits):
    linear, _ = case(grid, 1, 24, 100, **settings)
    X = torch.randn(1, 100, device=DEVICE)
    assert fused._suits(linear, X) == suits


def test_it_is_not_used_where_a_gradient_is_asked_for():
    linear, X = case(Grid(2, 32, False), 1, 24, 100)
    X.requires_grad_(True)
    assert not fused._suits(linear, X)
    with torch.no_grad():
        assert fused._suits(linear, X)
    linear.bias.requires_grad_(True)
    assert not fused._suits(linear, X.detach())


def test_autocast_takes_the_plain_path():
    linear, X = case(Grid(2, 32, False), 1, 24, 100)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert not fused._suits(linear, X)


def test_the_layer_calls_the_kernel_where_it_fits(monkeypatch):
    linear, X = case(Grid(2, 32, False), 3, 24, 100)
    plain = linear(X)
    called = []
    monkeypatch.setattr(fused, "fits", lambda linear, X: called.append(X.shape) or True)
    torch.testing.assert_close(linear(X), plain)
    assert called == [X.shape]


def test_a_cpu_never_takes_it():
    linear, X = case(Grid(2, 32, False), 1, 24, 100)
    assert not fused.fits(linear.cpu(), X.cpu())


def test_a_machine_that_cannot_build_it_says_so_and_goes_on(monkeypatch):
    assert fused.builds(DEVICE)

    def fail(*arguments, **settings):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(decode, "decode", fail)
    with pytest.warns(UserWarning, match="cannot be built.*Failed to find C compiler"):
        assert not fused.builds(DEVICE)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from apiq.layers.decode import INPUTS, OUTPUTS, _decode

for bits, run, zeros, whole in ((2, 16, "*i32", True), (3, 8, "constexpr", False)):
    fixed = {"BITS": bits, "RUN": run, "RUNS": INPUTS // run, "WHOLE_RUNS": whole, "ROWS": 2, "OUTPUTS": OUTPUTS}
    fixed["BALANCED"] = not whole
    fixed |= {"zeros": None} if zeros == "constexpr" else {}
    tensors = {"X": "*bf16", "codes": "*i32", "scales": "*fp16", "zeros": zeros, "bias": "*bf16", "Y": "*bf16"}
    kinds = {name: "constexpr" if name in fixed else tensors.get(name, "i32") for name in _decode.arg_names}
    source = ASTSource(_decode, kinds, {(_decode.arg_names.index(name),): value for name, value in fixed.items()})
    print(len(compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""


def test_it_compiles_for_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does; Triton brings the assembler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == 2 and all(int(size) > 1000 for size in run.stdout.split())
