"""Adapters of one block: how they start, what their names are, what the deployed linear computes."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import apiq
from apiq.adapters.injection import Adapters, decays, model_state, parameters
from apiq.adapters.targets import shapes
from apiq.adapters.tuners import TUNERS
from apiq.blocks.architecture import linears
from apiq.checkpoint.reading import linear
from apiq.methods.fitting import Fit

from .conftest import settings


def small_block():
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(16, 16)}), "up": nn.Linear(16, 32)}).requires_grad_(
        False
    )


def put_on(block, seed=0, **values):
    return Adapters(block, settings(**values), shapes(linears(block)), seed, start=True)


def test_the_seed_decides_the_start_and_the_global_state_is_left_alone():
    state = torch.get_rng_state()
    first, same, other = (put_on(small_block(), seed).state() for seed in (1, 1, 2))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["up.lora_A.weight"], other["up.lora_A.weight"])


def test_parameters_are_float32_in_a_block_of_lower_precision():
    block = small_block().bfloat16()
    adapters = put_on(block, adapter="dora")
    trained = adapters.trained(block, True) + adapters.trained(block, False)
    assert len(trained) == 6 and {parameter.dtype for parameter in trained} == {torch.float32}
    assert len(adapters.trained(block["up"], True)) == 2


def test_parameters_are_those_of_the_adapters_and_nothing_below_them():
    block = small_block()
    put_on(block, adapter="dora", adapter_targets=["up"])
    assert set(parameters(block)) == {
        "up.lora_A.default.weight", "up.lora_B.default.weight", "up.lora_magnitude_vector.default.weight"
    }  # fmt: skip


def test_loading_something_else_is_refused():
    adapters = put_on(small_block())
    state = adapters.state()
    with pytest.raises(KeyError, match=r"adapters differ: .'up\.lora_A\.weight'"):
        adapters.load({name: value for name, value in state.items() if name != "up.lora_A.weight"})


@pytest.mark.parametrize(
    ("parameter", "whether"),
    [
        (torch.zeros(4, 2), True),  # B of LoRA
        (torch.randn(2, 4), True),  # A
        (torch.ones(4, 1), False),  # IA3, which does nothing at 1
        (torch.randn(4), False),  # the magnitude of DoRA, a bias
    ],
)
def test_weight_decay_spares_what_is_not_neutral_at_0(parameter, whether):
    assert decays(parameter) is whether


def test_names_in_the_model():
    block = {"q.lora_A.weight": torch.ones(2), "base_model.vera_A": torch.ones(3)}
    assert list(model_state("model.layers", [block, block], TUNERS["vera"])) == [
        "base_model.model.model.layers.0.q.lora_A.weight", "base_model.vera_A",
        "base_model.model.model.layers.1.q.lora_A.weight",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot share base_model\.vera_A: it is another one in block 1"):
        model_state("model.layers", [block, {"base_model.vera_A": torch.zeros(3)}], TUNERS["vera"])


def test_vectors_that_are_numbered_through_the_model():
    order = sorted(range(11), key=str)  # as safetensors gives them back: 0, 1, 10, 2, ...
    vectors = [{f"base_model.tinylora_v.{i}": torch.tensor(100 * b + i) for i in order} for b in range(2)]
    state = model_state("layers", vectors, TUNERS["tinylora"])
    found = [int(state[f"base_model.tinylora_v.{i}"]) for i in range(22)]
    assert found == [*range(11), *range(100, 111)]


def test_only_the_targets_carry_adapters_and_all_linears_are_packed(make):
    made = make(adapter_targets=["attn"])
    stored = load_file(made.folder / "adapter" / "adapter_model.safetensors")
    assert stored and all(".self_attn." in name for name in stored)
    assert linear(made.folder, "model.layers.0.self_attn.q_proj").A is not None
    assert linear(made.folder, "model.layers.0.mlp.up_proj").A is None
    assert linear(made.folder, "model.layers.0.mlp.up_proj").codes.shape == (48, 32)


def test_dora_scales_by_the_norm_of_the_quantized_weight(make):
    """X -> X (m (Q + s B A) / |Q + s B A|)^T, with |.| the norm of each row of what is deployed."""
    made = make(adapter="dora")
    module = apiq.load(made.folder, device="cpu").model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    Q = module.base_layer.dequantized()
    V = Q + module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    m = module.lora_magnitude_vector["default"].weight
    X = torch.randn(5, 32)
    torch.testing.assert_close(module(X), X @ (m[:, None] * V / V.norm(dim=1, keepdim=True)).T, rtol=1e-4, atol=1e-5)


class OneBlock:
    """As much of a problem as Fit looks at."""

    def __init__(self):
        self.block, self.seed, self.grids, self.ranks = small_block(), 0, {}, {}

    def linears(self):
        return linears(self.block)


@pytest.mark.parametrize("adapter", ["pissa", "olora"])
def test_a_start_that_moves_weight_leaves_less_to_quantize_and_the_original_alone(adapter):
    problem = OneBlock()
    original = problem.block["up"]
    before = original.weight.clone()
    fit = Fit(problem, settings(adapter=adapter, bits=8, rank=8))
    carried, fake = problem.block["up"], fit.fakes["up"]
    moved = carried.scaling["default"] * carried.lora_B["default"].weight @ carried.lora_A["default"].weight
    assert torch.equal(original.weight, before)
    torch.testing.assert_close(fake.full_weight + moved, before, rtol=0, atol=1e-5)
    residual = torch.linalg.svdvals(fake.full_weight)
    if adapter == "pissa":  # the residual keeps the small singular values, and only those
        torch.testing.assert_close(residual[:8], torch.linalg.svdvals(before)[8:], rtol=1e-3, atol=1e-5)
    X = torch.randn(3, 16)
    torch.testing.assert_close(carried(X), X @ before.T + original.bias, rtol=0, atol=0.05)


def test_a_tuner_that_passes_no_gradient_stands_on_the_packed_linear():
    problem = OneBlock()
    fit = Fit(problem, settings(adapter="hra"))
    turns = fit.turns()
    first = next(turns)
    assert (first.grid, first.adapters, fit.adapters) == (True, False, None)
    assert [len(group.parameters) for group in fit.groups(first)] == [4]
    with torch.no_grad():
        fit.fakes["up"].gamma.fill_(0.5)
    second = next(turns)
    assert (second.grid, second.adapters, second.share(0.5)) == (False, True, 0.75)
    assert torch.equal(problem.block["up"].base_layer.codes, fit.fakes["up"].packed().codes)
    assert sum(len(group.parameters) for group in fit.groups(second)) == 2
    assert next(turns, None) is None
