"""The facts of the table, by gradient: what reaches the grid, and what every adapter trains."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from apiq.adapters.injection import Adapters
from apiq.adapters.targets import shapes
from apiq.adapters.tuners import TUNERS
from apiq.blocks.activations import Home
from apiq.blocks.architecture import find_blocks, linears, replace
from apiq.blocks.capture import capture
from apiq.grids.affine import Grid
from apiq.layers.fake_quant import FakeQuantLinear

from .conftest import settings


def wrapped(original, windows, adapter):
    """The first block with its call, its input, its fake linears and adapters away from their start."""
    model = AutoModelForCausalLM.from_pretrained(original).eval().requires_grad_(False)
    blocks = find_blocks(model)
    home = Home("device", torch.device("cpu"))
    X, calls = capture(model, blocks.modules, windows, torch.float32, lambda shape: home)
    block = blocks.modules[0]
    found = linears(block)
    fakes = {name: FakeQuantLinear(linear, Grid(2, 16, False)) for name, linear in found.items()}
    for name, fake in fakes.items():
        replace(block, name, fake)
    adapters = Adapters(block, settings(adapter=adapter), shapes(found), seed=0, start=not TUNERS[adapter].moves_weight)
    parameters = adapters.trained(block, True) + adapters.trained(block, False)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    for fake in fakes.values():
        fake.gamma.requires_grad_(True)
        fake.beta.requires_grad_(True)
    return block, calls[0], X[slice(0, 2)], fakes, parameters


def moved(parameters):
    return [parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters]


@pytest.mark.parametrize("adapter", TUNERS)
def test_gradients_reach_the_adapters_and_the_grid_where_the_table_says_so(original, windows, adapter):
    block, call, X, fakes, parameters = wrapped(original, windows, adapter)
    call.run(block, X, slice(0, 2)).square().mean().backward()
    grid = moved([parameter for fake in fakes.values() for parameter in (fake.gamma, fake.beta)])
    assert parameters and all(moved(parameters))
    if TUNERS[adapter].joint:
        assert all(grid)
    if adapter in ("hra", "shira"):  # the others that take turns take a part of themselves from the weight
        assert not any(grid)
