"""The walk: one block after another is quantized against what the full-precision model makes of its input.

    X = Xq = embeddings(windows)
    for block in blocks:
        T = block(X)                           full-precision output
        block = method.solve(block, X, Xq, T)
        Xq = block(Xq); X = T                  both feed the next block

The error of the earlier blocks is in Xq, so every block also undoes what it can of theirs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apiq import parallel
from apiq.adapters.injection import Adapters, ranks_of
from apiq.adapters.targets import shapes as linear_shapes
from apiq.blocks.activations import Activations, Home, choose_home, mean_squared_error
from apiq.blocks.architecture import replace
from apiq.blocks.capture import BlockCall, capture, counted
from apiq.blocks.problem import Method, Problem, Solution
from apiq.blocks.store import BlockStore, replacing
from apiq.blocks.stream import ModelStream
from apiq.blocks.survey import Surveyor, Whole
from apiq.blocks.unfuse import unfuse
from apiq.checkpoint.grid_config import described
from apiq.checkpoint.layout import block_file
from apiq.checkpoint.writing import shapes, stored, write_block
from apiq.device import precision
from apiq.errors import ApiqError
from apiq.grids.affine import SCALE_DTYPE
from apiq.memory import OutOfMemory
from apiq.params import QuantizeParams
from apiq.progress import Progress, Step

COPIES = 5
"""Sets of activations alive at a time: X, Xq, the two targets, and the next Xq."""

LARGEST = torch.finfo(SCALE_DTYPE).max / 2
"""The largest weight for whose group a scale can be stored, whatever the bits."""


@dataclass
class Walk:
    """One walk over the blocks of a model, of which no more than one is in memory at a time."""

    stream: ModelStream
    windows: Tensor | None
    method: Method
    params: QuantizeParams
    device: torch.device
    compute: torch.dtype
    storage: torch.dtype
    store: BlockStore
    progress: Progress
    cpu_clock: Callable[[], float]

    def run(self) -> None:
        """Quantize every block that the store does not hold yet.

        Raises:
            ApiqError: a weight is not finite, or a loss is not, whatever the rate.
        """
        count, done = len(self.stream.blocks.modules), len(self.store.records)
        if not done:
            with self.stream.rest() as model:
                _require_finite(model, "")
        X, Xq, calls = self._start(done)
        if isinstance(self.method, Surveyor):
            self._survey(self.method, X, calls)
        for index in range(done, count):
            while True:
                try:
                    X, Xq = self._block(index, calls[index], X, Xq)
                    break
                except (OutOfMemory, torch.OutOfMemoryError):
                    if X is None or Xq is None or not movable(X):
                        raise
                # what was allocated is held by the traceback until here
                X, Xq = self._moved(X, Xq)

    def _block(
        self, index: int, call: BlockCall, X: Activations | None, Xq: Activations | None
    ) -> tuple[Activations | None, Activations | None]:
        """Quantize block `index`; its outputs in the full-precision and in the quantized model."""
        block = self.stream.load_block(index, self.device)
        _require_finite(block, f"{self.stream.blocks.path}.{index}.", LARGEST)
        unfuse(block).requires_grad_(False)
        problem = self._problem(block, index, call, X, Xq)
        solution = self.method.solve(problem)
        adapters = deploy(block, solution, self.params, self.storage)
        Xq, last = self._propagate(problem)
        self._save(block, index, adapters, problem.targets, Xq)
        self._finish(block, index, solution, last)
        return problem.targets, Xq

    def _moved(self, X: Activations, Xq: Activations) -> tuple[Activations, Activations]:
        """The activations in RAM, and the memory of the device as empty as it was before the block."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        moved = X.moved(Home("memory", self.device))
        return moved, moved if Xq is X else Xq.moved(moved.home)

    def _start(self, done: int) -> tuple[Activations | None, Activations | None, list[BlockCall]]:
        count = len(self.stream.blocks.modules)
        if self.windows is None:
            return None, None, [BlockCall()] * count
        self.progress(Step("quantize", done, count, "embeddings"))
        with self.stream.embeddings(torch.device("cpu")) as model:
            X, calls = capture(model, self.stream.blocks.modules, self.windows, self.compute, self._home)
        if 0 < done < count:
            return *self.store.activations(done, X.home), calls
        return X, X, calls

    def _survey(self, method: Surveyor, X: Activations | None, calls: list[BlockCall]) -> None:
        """Let the method look at the whole model, unless it has before this run was interrupted."""
        count, found = len(calls), self.store.survey()

        def report(what: str, index: int) -> None:
            self.progress(Step("quantize", 0, count, f"survey, {what} block {index + 1}/{count}"))

        if found is None:
            found = method.survey(Whole(
                self.stream, self.windows, X, calls, self.device, self.params.activations, self.store.folder,
                lambda: precision(self.device, self.compute), report,
            ))  # fmt: skip
            parallel.wait()
            if parallel.rank() == 0:
                self.store.save_survey(found)
        method.surveyed(found)

    def _home(self, shape: tuple[int, ...]) -> Home:
        return choose_home(self.params.activations, shape, self.compute, COPIES, self.device, self.store.folder)

    def _problem(
        self, block: nn.Module, index: int, call: BlockCall, X: Activations | None, Xq: Activations | None
    ) -> Problem:
        count = len(self.stream.blocks.modules)

        def report(share: float, loss: float, detail: str) -> None:
            self.progress(Step("quantize", index + share, count, f"block {index + 1}/{count} {detail}", loss))

        mask = None if self.windows is None else counted(self.windows)
        problem = Problem(
            index, block, call, X, Xq, None, None if mask is None else mask.to(self.device),
            _seed(self.params.seed, index), lambda: precision(self.device, self.compute), report,
        )  # fmt: skip
        if X is not None:
            problem.targets = X.mapped(problem.run, self.params.batch_size)
        return problem

    def _propagate(self, problem: Problem) -> tuple[Activations | None, float | None]:
        """The output of the deployed block, and its mean squared error."""
        if problem.Xq is None or problem.targets is None:
            return None, None
        Xq = problem.Xq.mapped(problem.run, self.params.batch_size)
        error = mean_squared_error(lambda batch: Xq[batch], problem.targets, self.params.batch_size, problem.counted)
        if not math.isfinite(error):
            raise ApiqError(
                f"the output of the quantized block {problem.index} is not finite; set quantize.dtype to float32."
            )
        return Xq, error

    def _save(
        self, block: nn.Module, index: int, adapters: dict[str, Tensor], X: Activations | None, Xq: Activations | None
    ) -> None:
        if parallel.rank() == 0:
            with replacing(self.store.folder / block_file(index)) as path:
                write_block(path, block, f"{self.stream.blocks.path}.{index}", self.storage)
            self.store.save_adapters(index, adapters)
        if X is not None and Xq is not None and index + 1 < len(self.stream.blocks.modules):
            self.store.save_activations(index + 1, X, Xq)

    def _finish(self, block: nn.Module, index: int, solution: Solution, last: float | None) -> None:
        name = f"{self.stream.blocks.path}.{index}"
        record: dict[str, Any] = {
            "name": name,
            "shapes": shapes(block, name),
            "grids": {f"{index}.{linear}": described(packed.grid) for linear, packed in solution.linears.items()},
            "loss_first": last if solution.start is None else _known(solution.start),
            "loss_last": last,
            "unreached": [f"{name}.{each}" for each in solution.unreached],
            "curves": [
                {"name": curve.name, "losses": [_known(loss) for loss in curve.losses]} for curve in solution.curves
            ],
        }
        self.store.finish(record, self.cpu_clock())
        count = len(self.stream.blocks.modules)
        told = f", {len(solution.unreached)} linears without a token" if solution.unreached else ""
        self.progress(Step("quantize", index + 1, count, f"block {index + 1}/{count}{told}", last))


def _require_finite(module: nn.Module, prefix: str, largest: float = math.inf) -> None:
    """Refuse weights that are not finite, of those that are in memory, and matrices with values beyond `largest`."""
    for name, value in module.state_dict().items():
        if value.device.type == "meta" or not value.is_floating_point() or not value.numel():
            continue
        least, most = (float(bound) for bound in value.aminmax())  # NaN is both
        if math.isfinite(least) and math.isfinite(most) and (value.dim() < 2 or max(-least, most) <= largest):
            continue
        told = (
            "that is not finite" if not math.isfinite(most - least) else f"of {max(-least, most):g}, beyond {largest:g}"
        )
        raise ApiqError(
            f"the weight {prefix}{name} of the model holds a value {told}; nothing sensible can be quantized from it, "
            "get the model again."
        )


def movable(X: Activations) -> bool:
    """Whether the activations take memory from the device that they could do without."""
    return X.home.kind == "device" and X.device.type != "cpu"


def deploy(block: nn.Module, solution: Solution, params: QuantizeParams, storage: torch.dtype) -> dict[str, Tensor]:
    """Rebuild a block from its solution as it will be loaded; return its adapters in their stored precision."""
    for name, packed in solution.linears.items():
        replace(block, name, packed)
    for name, value in solution.others.items():
        kept = stored(value, storage).to(block.get_parameter(name))
        replace(block, name, nn.Parameter(kept, requires_grad=False))
    if not solution.adapters:
        return {}
    adapters = {name: stored(value, storage) for name, value in solution.adapters.items()}
    Adapters(block, params, linear_shapes(solution.linears), seed=0, ranks=ranks_of(adapters, params)).load(adapters)
    return adapters


def _known(loss: float) -> float | None:
    """A loss as JSON holds it: None where windows held out, or the start, gave one that is not finite."""
    return loss if math.isfinite(loss) else None


def _seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**63
