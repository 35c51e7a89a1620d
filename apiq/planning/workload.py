"""The work that a model and its settings make: the sizes of a block, the bytes and operations of a pass."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from apiq.adapters.injection import parameters
from apiq.blocks.architecture import linears
from apiq.blocks.capture import BlockCall
from apiq.blocks.problem import Problem
from apiq.blocks.unfuse import Experts
from apiq.layers.joint import jointly
from apiq.methods.fitting import Fit
from apiq.methods.grid import grid_of
from apiq.params import QuantizeParams
from apiq.planning import memory
from apiq.planning.memory import SMALL, BlockSizes
from apiq.planning.size import PackedBlock
from apiq.planning.step import Pass, count_forward, count_pass


def block_sizes(block: nn.Module, packed: PackedBlock, params: QuantizeParams, weight_bytes: int) -> BlockSizes:
    """The sizes of a block on the meta device."""
    grid, found = grid_of(params), linears(block).values()
    return BlockSizes(
        weights=sum(parameter.numel() for parameter in block.parameters()),
        groups=sum(linear.out_features * grid.groups(linear.in_features) for linear in found),
        adapter=sum(value.numel() for value in packed.adapters.values()),
        moving=sum(linear.weight.numel() for linear in found) if params.lr_weight else 0,
        largest=max(linear.weight.numel() for linear in found),
        widest=max(linear.in_features for linear in found),
        small=sum(p.numel() for p in block.parameters() if p.numel() * weight_bytes < SMALL),
    )


def fitting_pass(
    block: nn.Module, call: BlockCall, params: QuantizeParams, shape: tuple[int, int, int],
    compute: torch.dtype, storage: torch.dtype, device: torch.device,
) -> Pass:  # fmt: skip
    """One optimizer step on a batch (batch, length, width) of a block on the meta device that stays as it is."""
    weights = compute if compute == torch.float32 else storage
    around = jointly if params.method == "apiq-bw" else contextlib.nullcontext
    return count_pass(_fitted(block, call, params), call, shape, weights, compute, device, around)


def passing(
    block: nn.Module, call: BlockCall, params: QuantizeParams, shape: tuple[int, int, int],
    compute: torch.dtype, storage: torch.dtype, device: torch.device,
) -> int:  # fmt: skip
    """Most bytes alive at a time when windows (batch, length, width) only pass through a block that is fitted."""
    weights = compute if compute == torch.float32 else storage
    return count_forward(_fitted(block, call, params), call, shape, weights, compute, device)


def teaching_pass(
    block: nn.Module, call: BlockCall, shape: tuple[int, int, int], weights: torch.dtype, compute: torch.dtype,
    device: torch.device,
) -> int:  # fmt: skip
    """Most bytes alive at a time when windows (batch, length, width) pass through a full-precision block."""
    return count_forward(_evenly_routed(copy.deepcopy(block)), call, shape, weights, compute, device)


def _fitted(block: nn.Module, call: BlockCall, params: QuantizeParams) -> nn.Module:
    """A copy of a block with all that a fitting method trains in it; omniquant trains the ranges alone."""
    block = _evenly_routed(copy.deepcopy(block))
    if params.method in memory.FITTED:
        problem = Problem(
            index=0, block=block, call=call, X=None, Xq=None, targets=None, counted=None, seed=0,
            autocast=contextlib.nullcontext, report=lambda share, loss, detail: None,
        )  # fmt: skip
        alone = {"adapter": "none"} if params.method == "omniquant" else {}
        Fit(problem, params.model_copy(update={"ranges": "whole", "start": "default", **alone}))
    return block


def training_pass(
    packed: PackedBlock, call: BlockCall, shape: tuple[int, int, int], compute: torch.dtype, device: torch.device
) -> Pass:
    """Forward and backward of a packed block with trainable adapters on a batch (batch, length, width)."""
    block = _evenly_routed(copy.deepcopy(packed.module)).requires_grad_(False).to(compute)
    for parameter in parameters(block).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return count_pass(block, call, shape, compute, compute, device)


def _evenly_routed(block: nn.Module) -> nn.Module:
    """Let every expert of a mixture take its even share of the tokens: where they go cannot be told without data."""
    for module in block.modules():
        if isinstance(module, Experts):
            module._chosen = functools.partial(_evenly, len(module))
    return block


def _evenly(experts: int, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    rows, chosen = top_k_index.shape
    share = torch.arange(min(rows, math.ceil(rows * chosen / experts)), device=top_k_index.device)
    for number in range(experts):
        yield number, share, torch.zeros_like(share)
