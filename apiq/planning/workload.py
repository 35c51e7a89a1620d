"""The work that a model and its settings make: the sizes of a block, the bytes and operations of a pass."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn

from apiq.adapters.injection import parameters
from apiq.blocks.architecture import linears
from apiq.blocks.capture import BlockCall
from apiq.blocks.problem import Problem
from apiq.grids.affine import Grid
from apiq.methods import METHODS
from apiq.methods.fitting import Fit
from apiq.params import QuantizeParams
from apiq.planning.memory import BlockSizes
from apiq.planning.size import PackedBlock
from apiq.planning.step import Pass, count_pass


def block_sizes(block: nn.Module, packed: PackedBlock, params: QuantizeParams) -> BlockSizes:
    """The sizes of a block on the meta device."""
    grid, found = Grid(params.bits, params.group_size, params.symmetric), linears(block).values()
    return BlockSizes(
        weights=sum(parameter.numel() for parameter in block.parameters()),
        groups=sum(linear.out_features * grid.groups(linear.in_features) for linear in found),
        adapter=sum(value.numel() for value in packed.adapters.values()),
        largest=max(linear.weight.numel() for linear in found),
        widest=max(linear.in_features for linear in found),
    )


def fitting_pass(
    block: nn.Module, call: BlockCall, params: QuantizeParams, shape: tuple[int, int, int],
    compute: torch.dtype, storage: torch.dtype, device: torch.device,
) -> Pass:  # fmt: skip
    """One optimizer step on a batch (batch, length, width) of a block on the meta device that stays as it is."""
    block = copy.deepcopy(block)
    if METHODS[params.method].adapted:
        problem = Problem(
            index=0, block=block, call=call, X=None, Xq=None, targets=None, seed=0,
            autocast=contextlib.nullcontext, report=lambda share, loss, detail: None,
        )  # fmt: skip
        Fit(problem, params)
    weights = compute if compute == torch.float32 else storage
    return count_pass(block, call, shape, weights, compute, device)


def training_pass(
    packed: PackedBlock, call: BlockCall, shape: tuple[int, int, int], compute: torch.dtype, device: torch.device
) -> Pass:
    """Forward and backward of a packed block with trainable adapters on a batch (batch, length, width)."""
    block = copy.deepcopy(packed.module).requires_grad_(False).to(compute)
    for parameter in parameters(block).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return count_pass(block, call, shape, compute, compute, device)
