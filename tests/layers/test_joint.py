"""Linears computed together are the linears computed one by one."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from apiq.grids.affine import Grid
from apiq.layers import joint
from apiq.layers.fake_quant import FakeQuantLinear
from apiq.layers.joint import jointly


class Feed(nn.Module):
    """Three linears of two widths, as the feed-forward part of a block."""

    def __init__(self, grid):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(48, 40, bias=False), nn.Linear(48, 40), nn.Linear(40, 48)
        for name, linear in list(self.named_children()):
            setattr(self, name, FakeQuantLinear(linear, grid))

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def feed(group=16, symmetric=False, moving=False, **lora):
    torch.manual_seed(0)
    block = Feed(Grid(2, group, symmetric))
    with torch.no_grad():
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["gate", "down"], **lora), block)
        for name, parameter in block.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if name.endswith(("gamma", "beta")):
                parameter.uniform_(-1, 4).requires_grad_(True)
        for module in [*block.modules()] if moving else []:
            if isinstance(module, FakeQuantLinear):
                module.train_weight()
                module.shift.normal_()
    return block


def trained(block, x):
    """The output and every gradient."""
    output = block(x)
    output.square().sum().backward()
    parameters = {name.replace(".layer.", "."): p for name, p in block.named_parameters() if p.requires_grad}
    grads = {name: p.grad.clone() for name, p in parameters.items()}
    block.zero_grad()
    given, x.grad = x.grad, None
    return {"": output.detach(), "x": given, **grads}


@pytest.mark.parametrize("group", [0, 16, 43])
@pytest.mark.parametrize("symmetric", [False, True, "balanced"])
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_outputs_and_gradients_are_the_same(group, symmetric, moving, small, monkeypatch):
    if not small:
        monkeypatch.setattr(joint, "SMALL_BLOCK", 1)
    block, x = feed(group, symmetric, moving), torch.randn(3, 9, 48, requires_grad=True)
    apart = trained(block, x)
    seen = []
    hook = block.up.register_forward_hook(lambda module, args, output: seen.append(module.joint is not None))
    with jointly(block):
        together = trained(block, x)
    hook.remove()
    assert seen == [small]
    assert together.keys() == apart.keys()
    for name, expected in apart.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_only_plain_lora_is_folded():
    block, x = feed(use_dora=True), torch.randn(5, 48, requires_grad=True)
    apart = trained(block, x)
    kinds = {name: type(module) for name, module in block.named_children()}
    with jointly(block):
        assert {name: type(module) for name, module in block.named_children()} == kinds
        together = trained(block, x)
    for name, expected in apart.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_peft_layers_are_back_and_no_weight_is_left_also_after_a_failure():
    block = feed()
    names = [name for name, _ in block.named_modules()]
    with jointly(block), pytest.raises(RuntimeError):
        block(torch.randn(2, 47))
    assert [name for name, _ in block.named_modules()] == names
    assert block.up.joint is None
    assert not block._forward_hooks and not block._forward_pre_hooks


def test_weights_are_made_anew_for_every_pass():
    block, x = feed(), torch.randn(5, 48)
    lora = block.gate
    with jointly(block), torch.no_grad():
        before = block(x)
        block.up.gamma.sub_(3)
        lora.lora_B["default"].weight.add_(1)
        after = block(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, block(x))


def test_in_half_precision_a_small_block_is_left_to_the_linears_themselves():
    block, x = feed(), torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = block(x)
        with jointly(block):
            assert torch.equal(block(x), alone)


@pytest.mark.parametrize("moving", [False, True])
def test_in_half_precision_a_large_block_computes_its_lora_with_its_products(moving, monkeypatch):
    monkeypatch.setattr(joint, "SMALL_BLOCK", 1)
    block, x = feed(moving=moving), torch.randn(3, 9, 48, requires_grad=True)
    kinds = {name: type(module) for name, module in block.named_modules()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apart = trained(block, x)
        with jointly(block):
            together = trained(block, x)
            assert not isinstance(block.gate, LoraLayer)
            assert block.gate.layer.get_base_layer().room is block.up.room is not None
    assert {name: type(module) for name, module in block.named_modules()} == kinds
    assert block.up.room is None and not block._forward_pre_hooks
    for name, expected in apart.items():
        assert together[name].dtype == expected.dtype
        torch.testing.assert_close(together[name], expected, rtol=0.05, atol=0.03 * float(expected.abs().max()))
