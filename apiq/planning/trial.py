"""One random block of the model's shape, quantized and finetuned with the real code, timed."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from apiq.adapters.injection import parameters
from apiq.blocks.activations import Activations, Home
from apiq.blocks.capture import BlockCall
from apiq.blocks.problem import Problem
from apiq.blocks.store import BlockStore
from apiq.blocks.unfuse import unfuse
from apiq.blocks.walk import deploy
from apiq.checkpoint.writing import write_block
from apiq.methods import build
from apiq.params import QuantizeParams
from apiq.planning.outline import block_calls, probe

_TILE = 2**16
"""Random numbers that fill a weight over and over: drawing as many as it has would take longer than the trial."""
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "moe_intermediate_size")


@dataclass
class Run:
    """What one run of the trial took."""

    seconds: float
    epochs: list[float] = field(default_factory=list)
    """Seconds of the epochs but the first of each fit, relative to their mean."""


@dataclass
class Trial:
    """A block to be made again and again; everything random is drawn from one seed."""

    config: PretrainedConfig
    params: QuantizeParams
    device: torch.device
    compute: torch.dtype
    storage: torch.dtype
    folder: Path
    """Where the blocks and activations are written, on the disk of the unfinished work."""

    def __post_init__(self) -> None:
        self.model, self.blocks = probe(self.config)
        self.meta = unfuse(copy.deepcopy(self.blocks.modules[0]))
        self.width = int(self.config.get_text_config().hidden_size)

    def calls(self, length: int) -> list[BlockCall]:
        """The arguments of the blocks for windows of `length` tokens."""
        return block_calls(self.model, self.blocks, length, self.device)

    def block(self) -> nn.Module:
        """The first block with random weights."""
        block = copy.deepcopy(self.meta)
        dtype = self.compute if self.compute == torch.float32 else self.storage
        tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)) * 0.02
        for name, parameter in list(block.named_parameters()):
            value = torch.ones(parameter.shape, dtype=dtype)
            if parameter.dim() > 1:
                value = tile.repeat(parameter.numel() // _TILE + 1)[: parameter.numel()].view(parameter.shape).to(dtype)
            owner, _, own = name.rpartition(".")
            setattr(block.get_submodule(owner), own, nn.Parameter(value, requires_grad=False))
        return block.to(self.device)

    def quantize(self, shape: tuple[int, int], windows: int, epochs: int) -> tuple[Run, nn.Module]:
        """What the walk does with one block on `windows` windows of (batch, length); the deployed block."""
        params = self.params.model_copy(
            update={"epochs": epochs, "batch_size": shape[0], "held_out": 0.0, "patience": 0}
        )
        method, call, marks = build(params), self.calls(shape[1])[0], []
        block = self.block()
        rows = torch.randn(windows, shape[1], self.width, generator=torch.Generator().manual_seed(1))
        X = Activations(rows.to(self.device, self.compute), Home("device", self.device)) if method.calibrated else None
        Xq = X.mapped(lambda hidden, batch: hidden * 1.01, shape[0]) if X is not None else None
        with self._clock() as clock:
            problem = Problem(
                index=1, block=block, call=call, X=X, Xq=Xq, targets=None, counted=None, seed=0,
                autocast=self.precision,
                report=lambda share, loss, detail: marks.append((detail.rpartition("epoch ")[0], clock())),
            )  # fmt: skip
            if X is not None:
                problem.targets = X.mapped(problem.run, shape[0])
            solution = method.solve(problem)
            adapters = deploy(block, solution, params, self.storage)
            if problem.Xq is not None and problem.targets is not None:
                problem.error(shape[0])
                BlockStore(self.folder).save_activations(0, problem.targets, problem.Xq)
            write_block(self.folder / "block.safetensors", block, "block", self.storage)
            BlockStore(self.folder).save_adapters(0, adapters)
            seconds = clock()
        return Run(seconds, _epochs(marks)), block

    def finetune(self, block: nn.Module, shape: tuple[int, int], checkpointing: bool, dtype: torch.dtype) -> float:
        """Seconds of a forward and backward through the deployed `block` on a batch of (batch, length)."""
        call, whole = self.calls(shape[1])[0], slice(0, shape[0])
        hidden = torch.randn(*shape, self.width, device=self.device).requires_grad_()
        block.requires_grad_(False)
        for parameter in parameters(block).values():
            parameter.requires_grad_(True)

        def step() -> None:
            with self.precision(dtype):
                output = checkpoint(call.run, block, hidden, whole, use_reentrant=False) if checkpointing else None
                output = call.run(block, hidden, whole) if output is None else output
            assert isinstance(output, Tensor)
            output.float().square().mean().backward()

        return self._fastest(step)

    def head(self, rows: int, vocabulary: int, dtype: torch.dtype) -> float:
        """Seconds of logits and cross-entropy for `rows` tokens and so many entries, forward and backward."""
        weight = torch.randn(vocabulary, self.width, device=self.device, dtype=dtype)
        hidden = torch.randn(rows, self.width, device=self.device, dtype=dtype).requires_grad_()
        labels = torch.zeros(rows, dtype=torch.long, device=self.device)
        return self._fastest(lambda: nn.functional.cross_entropy((hidden @ weight.T).float(), labels).backward())

    def precision(self, dtype: torch.dtype | None = None) -> AbstractContextManager:
        """The context of the arithmetic."""
        dtype = dtype or self.compute
        return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)

    def _fastest(self, step: Any) -> float:
        step()
        times = []
        for _ in range(3):
            start = self._now()
            step()
            times.append(self._now() - start)
        return min(times)

    @contextlib.contextmanager
    def _clock(self) -> Iterator[Any]:
        """Seconds since its start, with no garbage of earlier trials to collect in between."""
        gc.collect()
        start = self._now()
        yield lambda: self._now() - start

    def _now(self) -> float:
        """Seconds of this process on a CPU, where others may compute too, of the clock on a GPU."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.monotonic()


def narrowed(config: PretrainedConfig, factor: int) -> PretrainedConfig:
    """The configuration of a model `factor` times as narrow, with heads as wide as before."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads = text.hidden_size // text.num_attention_heads
    for name in _SIZES:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, max(1, getattr(text, name) // factor))
    if getattr(text, "head_dim", None) is None and hasattr(text, "head_dim"):
        text.head_dim = heads
    return config


def _epochs(marks: list[tuple[str, float]]) -> list[float]:
    """Seconds between two reports of the same fit, relative to the mean of that fit."""
    fits: dict[str, list[float]] = {}
    for (one, earlier), (other, later) in itertools.pairwise(marks):
        if one == other:
            fits.setdefault(one, []).append(later - earlier)
    return [seconds / statistics.mean(taken) for taken in fits.values() for seconds in taken]
