"""The 20-second calibration of this machine: how the trial is cut to what it may take, run, and scaled up."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from apiq.grids.affine import Grid
from apiq.grids.compiled import many
from apiq.grids.levels import TERNARY
from apiq.layers.fake_quant import FakeQuantLinear
from apiq.params import FinetuneParams, QuantizeParams
from apiq.planning.forecast import Costs, fit, two_sizes
from apiq.planning.machine import standing
from apiq.planning.memory import FITTED
from apiq.planning.outline import Outline
from apiq.planning.size import packed_block
from apiq.planning.step import Pass
from apiq.planning.trial import Trial, narrowed
from apiq.planning.workload import fitting_pass, training_pass

STEP, RUN, PACKING = 0.3, 2.5, 1.0
"""Seconds that one optimizer step, the longest run and the packing of the trial's block may take, by a first guess."""
SAMPLE = 1024
"""Width of the linear whose packing is timed first."""
NARROWEST, SHORTEST = 1024, 32
"""Hidden width and tokens below which a trial says too little about a larger model."""
ROWS, ENTRIES = 256, 2048
"""Tokens and entries of the vocabulary on which the head is timed."""
USUAL, SCALED = 0.15, 0.25
"""Relative uncertainty of a trial of the model's own shape, and of one that had to be narrower or shorter."""


@dataclass(frozen=True)
class Timing:
    """What the calibration found."""

    costs: Costs
    tuning: float | None
    """Seconds to finetune one batch; None without adapters."""
    seconds: float
    """How long the calibration took."""
    slowdown: float
    """Seconds on the clock for each second counted: below 1 with several threads, above 1 where others compute too."""


@dataclass
class Calibration:
    """The settings of a run, for which one block is tried out."""

    outline: Outline
    params: QuantizeParams
    shape: tuple[int, int]
    """Windows and tokens of a batch."""
    windows: int
    finetune: FinetuneParams
    device: torch.device
    compute: torch.dtype
    tuning_dtype: torch.dtype
    work: Path
    """Folder of the unfinished work; the trial writes on the same disk."""
    full: Pass
    """One optimizer step of the model itself."""
    full_tuning: Pass | None
    """Forward and backward of one packed block of the model itself, in finetuning."""
    swept: int
    """Weights of a block times optimizer steps: whether the elementwise work is compiled on a CPU."""

    def run(self) -> Timing:
        """Time one block."""
        start, cpu = time.monotonic(), time.process_time()
        factor = self._narrowing()
        config = narrowed(self.outline.config, factor) if factor > 1 else self.outline.config
        rank, *ranks = (max(1, rank // factor) for rank in (self.params.rank, *self.params.candidate_ranks))
        params = self.params.model_copy(update={"rank": rank, "candidate_ranks": ranks})
        with TemporaryDirectory(dir=standing(self.work), prefix=".apiq-plan.") as folder:
            trial = Trial(config, params, self.device, self.compute, self.outline.storage, Path(folder))
            self._rate = self._measured_rate(trial)
            with many(self.swept):
                costs, block = self._quantizing(trial, params, factor)
            tuning = None if self.full_tuning is None else self._finetuning(trial, block, params, self.full_tuning)
        seconds = time.monotonic() - start
        slowdown = seconds / (time.process_time() - cpu) if self.device.type == "cpu" else 1.0
        return Timing(costs, tuning, seconds, slowdown)

    def _narrowing(self) -> int:
        """How many times narrower the trial must be so that packing its block does not take all the time."""
        linear = nn.Linear(SAMPLE, SAMPLE, bias=False, device=self.device)
        bits = self.params.bits
        fake = FakeQuantLinear(linear, Grid(bits, self.params.group_size, bits == TERNARY))
        fake.packed()
        begin = time.process_time()
        fake.packed()
        self._packing = (time.process_time() - begin) / SAMPLE**2
        weights, factor = _weights(self.outline.blocks.modules[0]), 1
        while self._packing * weights / factor**2 > PACKING and self.outline.width // (2 * factor) >= NARROWEST:
            factor *= 2
        return factor

    def _quantizing(self, trial: Trial, params: QuantizeParams, factor: int) -> tuple[Costs, nn.Module]:
        trial.quantize((1, SHORTEST), 1, min(1, params.epochs))  # imports, kernels, allocators
        shape = self._shorter(self.shape, self.full.flops / factor**2)
        work = self._counted(trial, params, shape)
        total = -(-self.windows // self.shape[0])
        step = work.flops / self._rate
        batches = max(1, min(total, int(RUN / 3 / step) or 1, 16))
        epochs = min(params.epochs, max(1, int(RUN / (batches * step))), 8)
        few = trial.quantize(shape, shape[0], 0)[0].seconds
        many = trial.quantize(shape, batches * shape[0], 0)[0].seconds if batches > 1 else few
        fitted, block = trial.quantize(shape, batches * shape[0], epochs)
        c, p, s = fit(few, many, fitted.seconds, (1, batches), epochs if params.method in FITTED else 0)
        spread = _spread(fitted.epochs)
        weights = _weights(self.outline.blocks.modules[0]) / _weights(trial.meta)
        if factor > 1 or shape != self.shape:
            shorter = self._counted(trial, params, (shape[0], max(8, shape[1] // 4)))
            less = trial.quantize((shape[0], max(8, shape[1] // 4)), batches * shape[0], epochs)[0].seconds
            less = max(0.0, less - c - p * batches * shorter.flops_forward / work.flops_forward)
            a, b = two_sizes(s, less / (batches * max(1, epochs)), (work.flops, shorter.flops))
            s, spread = a * weights + b * self.full.flops, max(SCALED, spread)
            p *= self.full.flops_forward / work.flops_forward
        c += self._packing * (_weights(self.outline.blocks.modules[0]) - _weights(trial.meta))
        return Costs(c, p, s, max(USUAL, spread), shape, factor), block

    def _finetuning(self, trial: Trial, block: nn.Module, params: QuantizeParams, full: Pass) -> float:
        """Seconds of one batch through all blocks and the head."""
        asked = (self.finetune.batch_size, self.finetune.length)
        shape = self._shorter(asked, full.flops)
        again, dtype = self.finetune.activation_checkpointing, self.tuning_dtype
        seconds = trial.finetune(block, shape, again, dtype)
        weights = _weights(self.outline.blocks.modules[0]) / _weights(trial.meta)
        if weights != 1 or shape != asked:
            shorter = (shape[0], max(8, shape[1] // 4))
            packed = packed_block(trial.meta, params, self.outline.storage)
            work, less = (
                training_pass(packed, trial.calls(s[1])[0], (*s, trial.width), dtype, self.device).flops
                for s in (shape, shorter)
            )
            a, b = two_sizes(seconds, trial.finetune(block, shorter, again, dtype), (work, less))
            seconds = a * weights + b * full.flops
        entries = int(self.outline.config.get_text_config().vocab_size)
        timed = min(entries, ENTRIES)
        head = trial.head(ROWS, timed, dtype) * entries / timed * asked[0] * asked[1] / ROWS
        return seconds * len(self.outline.blocks.modules) + head * self.outline.width / trial.width

    def _measured_rate(self, trial: Trial) -> float:
        """Operations a second of a forward of the trial's block."""
        call, block = trial.calls(SHORTEST)[0], trial.block()
        hidden = torch.randn(1, SHORTEST, trial.width, device=self.device)
        with torch.no_grad(), trial.precision():
            call.run(block, hidden, slice(0, 1))
            begin = time.process_time()
            call.run(block, hidden, slice(0, 1)).sum().item()
        return 2 * _weights(block) * SHORTEST / (time.process_time() - begin)

    def _shorter(self, shape: tuple[int, int], operations: float) -> tuple[int, int]:
        """The largest batch up to `shape` whose step may take STEP seconds: fewer windows first, then shorter."""
        batch, length = shape
        while operations / self._rate > STEP and (batch > 1 or length > SHORTEST):
            batch, length = (batch // 2, length) if batch > 1 else (batch, length // 2)
            operations /= 2
        return batch, length

    def _counted(self, trial: Trial, params: QuantizeParams, shape: tuple[int, int]) -> Pass:
        if shape == self.shape and trial.config is self.outline.config:
            return self.full
        call, full_shape = trial.calls(shape[1])[0], (*shape, trial.width)
        return fitting_pass(trial.meta, call, params, full_shape, self.compute, self.outline.storage, self.device)


def _weights(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def _spread(epochs: list[float]) -> float:
    """Relative deviation of the seconds of an epoch."""
    return statistics.stdev(epochs) if len(epochs) > 1 else 0.0
