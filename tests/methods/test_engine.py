"""The engine on a whole block: its gradients, its precision, its memory, its options."""

import contextlib
import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.blocks.activations import Activations, Home
from apiq.blocks.architecture import find_blocks
from apiq.blocks.capture import capture
from apiq.blocks.problem import Problem
from apiq.errors import ApiqError
from apiq.layers import joint
from apiq.layers.joint import jointly
from apiq.methods import build
from apiq.methods.fitting import Fit
from apiq.params import QuantizeParams
from benchmarks.reference import ReferenceLinear, reference_block

HOME = Home("device", torch.device("cpu"))


def settings(**values):
    return QuantizeParams(**{"group_size": 16, "rank": 4, "epochs": 4, "lr_adapter": 0.005, **values})


def in_half(dtype):
    return lambda: torch.autocast("cpu", dtype=dtype)


def make(outlier=0.0, autocast=contextlib.nullcontext):
    """A problem of six windows; `outlier` is put into one weight of each linear."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    blocks = find_blocks(model)
    windows = torch.randint(0, 61, (6, 12), generator=torch.Generator().manual_seed(1))
    X, calls = capture(model, blocks.modules, windows, torch.float32, lambda shape: HOME)
    noise = torch.randn(X.rows.shape, generator=torch.Generator().manual_seed(2))
    Xq = Activations(X.rows + 0.05 * noise, HOME)
    problem = Problem(1, blocks.modules[0], calls[0], X, Xq, None, None, 3, autocast, lambda *_: None)
    if outlier:
        for linear in problem.linears().values():
            linear.weight[0, 0] = outlier
    problem.targets = X.mapped(problem.run, 2)
    return problem


@pytest.mark.parametrize("group", [0, 16, 43])
@pytest.mark.parametrize("limit", [0, joint.SMALL_BLOCK])
def test_gradients_are_those_of_algorithm_1_written_down_for_autograd(group, limit, monkeypatch):
    monkeypatch.setattr(joint, "SMALL_BLOCK", limit)
    problem = make()
    Fit(problem, settings(group_size=group))
    with torch.no_grad():
        for name, parameter in problem.block.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if name.endswith(("gamma", "beta")):
                parameter.uniform_(0, 4)
    twin = reference_block(problem.block)
    for name, layer in twin.named_modules():
        if isinstance(layer, ReferenceLinear):
            fake = problem.block.get_submodule(name).base_layer
            layer.gamma.data, layer.beta.data = fake.gamma.detach().clone(), fake.beta.detach().clone()
    batch = slice(0, 4)
    losses = []
    for block, context in ((problem.block, jointly(problem.block)), (twin, contextlib.nullcontext())):
        with context:
            output = problem.call.run(block, problem.Xq[batch], batch)
            losses.append(problem.distance(output, problem.targets[batch], batch))
            losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for name, layer in twin.named_modules():
        if isinstance(layer, ReferenceLinear):
            mine = problem.block.get_submodule(name)
            pairs = [
                (mine.base_layer.gamma, layer.gamma), (mine.base_layer.beta, layer.beta),
                (mine.lora_A["default"].weight, layer.A), (mine.lora_B["default"].weight, layer.B),
            ]  # fmt: skip
            for one, other in pairs:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5 * float(other.grad.abs().max()))


@pytest.mark.parametrize("method", ["apiq-lw", "apiq-bw"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outlier", [0.0, 8.0])
def test_half_precision_and_outliers_end_near_float32(method, dtype, outlier):
    exact = build(settings(method=method, epochs=8)).solve(make(outlier))
    half = build(settings(method=method, epochs=8)).solve(make(outlier, in_half(dtype)))
    for one, other in zip(half.curves, exact.curves, strict=True):
        assert all(torch.tensor(one.losses).isfinite())
        assert one.losses[-1] < one.losses[0]
        assert one.losses[-1] < 1.3 * other.losses[-1] + 1e-3


def test_float16_that_overflows_is_refused_with_block_step_and_what_to_change():
    """An outlier whose products leave the range of float16, whatever the rate."""
    problem = make(3e4, in_half(torch.float16))
    problem.Xq.rows.mul_(50)
    problem.targets = Activations(torch.zeros_like(problem.Xq.rows), HOME)
    with pytest.raises(ApiqError, match=r"block 1 is not finite in epoch 1, step 1.*dtype to float32"):
        build(settings(second_term=False)).solve(problem)


@pytest.mark.parametrize("method", ["apiq-lw", "apiq-bw"])
def test_steps_that_are_divided_for_want_of_memory_end_in_the_same_state(method, monkeypatch):
    params = settings(method=method, batch_size=3)
    whole = build(params).solve(make())
    problem = make()
    run = Problem.run

    def narrow(self, hidden, batch):
        if len(hidden) > 1:
            raise torch.OutOfMemoryError
        return run(self, hidden, batch)

    monkeypatch.setattr(Problem, "run", narrow)
    divided = build(params).solve(problem)
    for name, value in whole.adapters.items():
        torch.testing.assert_close(divided.adapters[name], value, rtol=1e-3, atol=1e-5)
    for one, other in zip(divided.curves, whole.curves, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)


@pytest.mark.parametrize("method", ["apiq-lw", "apiq-bw"])
def test_every_option_gives_the_same_bits_again_and_keeps_the_best_state(method):
    params = settings(
        method=method, batch_size=2, shuffle=True, schedule="cosine", held_out=0.3, patience=2, epochs=6, lr_theta=0.2
    )
    first = build(params).solve(make())
    torch.manual_seed(99)
    second = build(params).solve(make())
    assert [curve.losses for curve in first.curves] == [curve.losses for curve in second.curves]
    assert all(torch.equal(value, second.adapters[name]) for name, value in first.adapters.items())
    assert all(torch.equal(packed.codes, second.linears[name].codes) for name, packed in first.linears.items())
    aside = [curve for curve in first.curves if curve.name.endswith("held out")]
    assert len(aside) == len(first.curves) / 2
    other = build(params).solve(Problem(**{**vars(make()), "seed": 4}))
    assert [curve.losses for curve in first.curves] != [curve.losses for curve in other.curves]


def test_blocks_computed_jointly_and_apart_end_in_the_same_state(monkeypatch):
    params = settings(epochs=2)
    together = build(params).solve(make())
    monkeypatch.setattr(joint, "SMALL_BLOCK", 0)
    apart = build(params).solve(copy.copy(make()))
    for name, value in apart.adapters.items():
        torch.testing.assert_close(together.adapters[name], value, rtol=1e-3, atol=1e-4)
    assert together.curves[0].losses == pytest.approx(apart.curves[0].losses, rel=1e-4)
