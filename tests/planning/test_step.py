"""Bytes and operations of a pass, against arithmetic by hand and against what autograd really keeps."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from apiq.blocks.capture import BlockCall
from apiq.blocks.problem import Problem
from apiq.methods.fitting import Fit
from apiq.params import QuantizeParams
from apiq.planning.outline import block_calls, probe
from apiq.planning.step import count_head, count_pass
from apiq.planning.workload import fitting_pass
from tests.families.zoo import ZOO

CPU = torch.device("cpu")


class Twice(nn.Module):
    """Two linears, of which the second is trained."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.trained = nn.Linear(8, 8, bias=False)

    def forward(self, hidden):
        return self.trained(self.frozen(hidden))


def count(batch):
    with torch.device("meta"):
        block = Twice()
    return count_pass(block, BlockCall(), (batch, 5, 8), torch.float32, torch.float32, CPU)


def test_the_operations_of_linears():
    product = 2 * 3 * 5 * 8 * 8
    work = count(3)
    assert work.flops_forward == 2 * product
    assert work.flops == 3 * product  # the gradient of the trained weight; nothing before it asks for one


def test_bytes_grow_with_the_batch_and_hold_the_gradient():
    rows = 5 * 8 * 4  # bytes of the hidden states of one window
    few, many = count(1), count(11)
    assert many.kept - few.kept == 10 * 2 * rows  # the output of either linear is alive: input of the second, result
    assert few.peak >= few.kept + 8 * 8 * 4


def real_saved(block, call, shape):
    """Bytes of the storages that autograd keeps for the backward of a real block, beside its own tensors."""
    own = {value.untyped_storage().data_ptr() for value in [*block.parameters(), *block.buffers()]}
    kept = {}

    def pack(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), value)  # held, so that no address is used twice
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = call.run(block, torch.randn(shape), slice(0, shape[0]))
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


def test_what_is_kept_is_what_autograd_keeps_in_the_real_block():
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model, blocks = probe(config)
    call = block_calls(model, blocks, 32, CPU)[0]
    params, shape = QuantizeParams(recipe="paper", method="apiq-lw", rank=4, group_size=32), (2, 32, 64)
    work = fitting_pass(blocks.modules[0], call, params, shape, torch.float32, torch.float32, CPU)
    block = copy.deepcopy(blocks.modules[0]).to_empty(device="cpu")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    problem = Problem(
        index=0, block=block, call=call, X=None, Xq=None, targets=None, counted=None, seed=0,
        autocast=contextlib.nullcontext, report=lambda *_: None,
    )  # fmt: skip
    Fit(problem, params)
    assert work.kept == pytest.approx(real_saved(block, call, shape), rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "deberta_v2", "mixtral", "qwen2_moe"])
def test_a_pass_of_every_kind_of_block_is_counted(family):
    config = copy.deepcopy(ZOO[family].config)
    config.architectures = [ZOO[family].head]
    model, blocks = probe(config)
    call = block_calls(model, blocks, 8, CPU)[0]
    from apiq.blocks.architecture import linears
    from apiq.blocks.unfuse import unfuse

    block = unfuse(copy.deepcopy(blocks.modules[0]))
    passed = {"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2}.get(family, 1)
    weights = sum(
        linear.weight.numel() * (passed / 4 if "experts" in name else 1) for name, linear in linears(block).items()
    )
    work = fitting_pass(
        block,
        call,
        QuantizeParams(recipe="paper", rank=4, group_size=16),
        (2, 8, 32),
        torch.float32,
        torch.float32,
        CPU,
    )
    assert work.flops_forward >= 2 * 16 * weights
    assert work.flops > 2 * work.flops_forward
    assert work.peak >= work.kept > 0


def test_the_head_holds_its_logits():
    logits = 7 * 1000 * 4
    assert 2 * logits <= count_head(7, 1000, 16, torch.float32, CPU) <= 6 * logits
