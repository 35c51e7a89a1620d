"""Pooled LoRA: what pooling does to A, and that no optimizer undoes it."""

import math

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from apiq.adapters.pooled import Pooling, is_pooled, means, pooled, spread, values
from apiq.errors import ApiqError
from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat
from apiq.methods.grid import rounded

WIDTHS = [(43, 16), (43, 43), (32, 8), (5, 1)]
"""Columns and group width; the last group of the first is shorter."""


AFFINE = Grid(2, 16, False)


def network(first=AFFINE, config=None):
    """Two packed linears with adapters, one of which has groups that do not divide its 43 inputs."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(43, 16), nn.Linear(16, 10))
    for index, grid in enumerate((first, Grid(3, 0, True))):
        if grid is not None:
            base[index] = rounded(base[index], grid)
    return get_peft_model(base, config or LoraConfig(r=4, target_modules=["0", "1"]))


def factors(model):
    """A and B of both linears with the width of their groups."""
    layers = [model.base_model.model[index] for index in (0, 1)]
    return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight, width)
            for layer, width in zip(layers, (16, 16), strict=True)]  # fmt: skip


@pytest.mark.parametrize(("columns", "width"), WIDTHS)
def test_means_are_those_of_each_group(columns, width):
    A = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    V = means(A, width)
    expected = torch.stack([part.mean(1) for part in A.split(width, 1)], 1)
    torch.testing.assert_close(V, expected)
    whole = spread(V, width, columns)
    assert all(torch.equal(whole[:, j], V[:, j // width]) for j in range(columns))
    assert torch.equal(values(whole, width), V)
    if width > 1:
        assert values(A, width) is None
        broken = whole.clone()
        broken[1, columns - 1] = broken[1, columns - 1].nextafter(torch.tensor(9.0))
        assert values(broken, width) is None


@pytest.mark.parametrize(("columns", "width"), WIDTHS)
def test_a_fitted_adapter_goes_to_the_nearest_pooled_one(columns, width):
    """By least squares over all V, for c B A."""
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, columns, generator=generator), torch.randn(6, 3, generator=generator)
    groups = math.ceil(columns / width)
    basis = torch.stack([(B[:, [i]] * spread(torch.eye(groups), width, columns)[[g]]).flatten()
                         for i in range(3) for g in range(groups)], 1)  # fmt: skip
    best = torch.linalg.lstsq(basis, (B @ A).flatten()).solution
    torch.testing.assert_close(pooled(A, B, width), spread(best.view(3, -1), width, columns), rtol=1e-4, atol=1e-4)


def test_a_random_start_keeps_the_variance_of_what_it_gives():
    generator = torch.Generator().manual_seed(2)
    A, X = torch.randn(64, 1000, generator=generator), torch.randn(500, 1000, generator=generator)
    start = pooled(A, torch.zeros(7, 64), 48)
    assert values(start, 48) is not None
    assert float((X @ start.t()).var() / (X @ A.t()).var()) == pytest.approx(1, abs=0.1)
    assert float((X @ pooled(A, torch.ones(7, 64), 48).t()).var() / (X @ A.t()).var()) < 0.05


def test_what_is_pooled_stays_as_it_is():
    A = spread(torch.randn(4, 3, generator=torch.Generator().manual_seed(3)), 16, 43)
    assert torch.equal(pooled(A, torch.zeros(5, 4), 16), A)
    assert torch.equal(pooled(A, torch.ones(5, 4), 16), A)


@pytest.mark.parametrize("fused", [False, True])
def test_training_keeps_it_pooled_bit_for_bit_with_mean_gradients(fused):
    """A fused step rounds the end of a tensor otherwise than the rest; 4 x 43 numbers have such an end."""
    model, free = network(), network()
    pooling = Pooling(model, "finetune.pooled")
    assert pooling.change > 0.5 and is_pooled(model)
    free.load_state_dict(model.state_dict())
    X = torch.randn(9, 43, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=fused)
    start = [A.detach().clone() for A, _, _ in factors(model)]
    for step in range(30):
        optimizer.zero_grad()
        for part in X.split(3):  # accumulated
            model(part).square().sum().backward()
        if step == 1:  # B is no longer 0
            free.load_state_dict(model.state_dict())
            free(X).square().sum().backward()
            for (A, _, width), (loose, _, _) in zip(factors(model), factors(free), strict=True):
                expected = spread(means(loose.grad, width), width, A.shape[1])
                torch.testing.assert_close(A.grad, expected, rtol=1e-4, atol=1e-5)
                assert values(A.grad, width) is not None and bool(A.grad.any())
        optimizer.step()
        pooling.settle()
        assert is_pooled(model)
    for (A, B, _), before in zip(factors(model), start, strict=True):
        assert bool(B.any()) and not torch.equal(A, before)


def test_released_it_leaves_gradients_alone():
    model = network()
    pooling = Pooling(model, "finetune.pooled")
    with torch.no_grad():
        for A, B, _ in factors(model):
            B.normal_()
            A[:, 5] += 1
    pooling.release()
    assert is_pooled(model)
    model(torch.randn(3, 43)).square().sum().backward()
    assert values(factors(model)[0][0].grad, 16) is None


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: network(first=None), "0 is not quantized and so no zero points"),
        (lambda: network(first=NormalFloat(4, 16)), "0 has NormalFloat levels and so no zero points"),
        (lambda: network(config=LoraConfig(r=4, target_modules=["1"], use_dora=True)), "on .*1 is not plain LoRA"),
        (lambda: network(config=LoraConfig(r=4, target_modules=["1"], lora_bias=True)), "on .*1 is not plain LoRA"),
        (
            lambda: network(config=IA3Config(target_modules=["0"], feedforward_modules=[])),
            r"finetune\.pooled is true, and the adapter on base_model\.model\.0 is not plain LoRA",
        ),
        (lambda: nn.Linear(3, 3), "the model has no LoRA"),
    ],
    ids=["dense", "normal-float", "dora", "bias", "ia3", "none"],
)
def test_what_cannot_be_pooled_is_refused(made, match):
    with pytest.raises(ApiqError, match=match) as caught:
        Pooling(made(), "finetune.pooled")
    assert str(caught.value).count(". ") == 0
