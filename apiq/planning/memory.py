"""The arithmetic of memory: bytes on the device, in RAM and on disk, from the sizes of a model and its settings.

Pure functions of numbers. Every term is what the named code holds at its worst moment; what one pass through a
block makes and keeps is counted by `apiq.planning.step`. docs/reference/plan.md holds predicted against measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from apiq.planning.step import Pass

FLOAT = 4
"""Bytes of a float32, in which everything that is trained and its AdamW moments are kept."""
COMPILER = 2 * 10**8
"""Bytes that torch.compile takes on a CPU, most of them for what it imports."""
FITTED = frozenset({"apiq-bw", "apiq-lw", "omniquant"})
"""Methods that descend on gradients."""
MOMENTS = {"gptq": 6, "gptq-lora": 6, "awq": 4, "closed-form": 8}
"""Matrices of the second moments (in, in) of one linear that a method holds: sums, Hessian, factors, inverse."""
DECOMPOSED = 8
"""Matrices of the size of the largest linear while loftq and lq-lora decompose it: W, what is left, U, V, workspace."""
TRANSFORMED = 3
"""Weights of all linears that omniquant keeps for its backward pass beside W: W c, Q and Q / c."""
STATES = {"adamw": 8, "adamw-8bit": 2, "paged-adamw-8bit": 2}
"""Bytes of both moments of a parameter, by finetune.optimizer."""
GUARD = 3
"""Copies that `apiq.methods.descent` keeps of the last good state: the parameters and their two moments."""
PACKING = 25
"""Bytes a weight of one linear while its codes are packed (`apiq.grids.packing`): three int64 and a uint8."""
DEQUANTIZED = 9
"""Bytes a weight of one linear while `apiq.layers.packed` dequantizes it: shifted words, codes, the product."""
SMALL = 2**25
"""Tensors of so many bytes and more are given back by glibc when they are freed, smaller ones scatter in its heap."""
KEPT = 6
"""Times the small weights of a block that are found in that heap after many blocks, as measured."""
KEPT_TRAINING = 32
"""The same in finetuning, where every linear is dequantized again and again, in pieces of another size each."""


@dataclass(frozen=True)
class BlockSizes:
    """The largest block of a model with everything that a method puts into it."""

    weights: int
    """Parameters of the block as it comes."""
    groups: int
    """Groups of all its linears: each has a scale and a zero point."""
    adapter: int
    """Adapter parameters."""
    moving: int
    """Weights of its linears where they are trained themselves, else 0."""
    largest: int
    """Weights of its largest linear."""
    widest: int
    """Inputs of its widest linear."""
    small: int
    """Parameters in tensors of less than SMALL bytes each, in the precision in which they are computed with."""


def solver(method: str, block: BlockSizes, work: Pass, passing: int, weight_bytes: int) -> dict[str, int]:
    """Bytes on the device to quantize one block.

    The weights in the precision in which they are computed with, the extrema and clipping parameters (low, high,
    gamma, beta) of each group, in float32 the adapters and the shifts of weights that are trained, the moments of AdamW
    with their guard, and the largest of a step (the activations kept for backward, gradients and temporaries), a pass
    of many windows without gradients, and the packing of a linear at the end. Methods that are not FITTED hold second
    moments instead, or nothing.

    Args:
        method: quantize.method.
        block: sizes of the largest block.
        work: one step on a batch.
        passing: bytes alive in a pass without gradients.
        weight_bytes: bytes of a weight while it is computed with.
    """
    largest, weights = PACKING * block.largest, block.weights * weight_bytes
    if method in ("loftq", "lq-lora"):
        largest = max(largest, FLOAT * DECOMPOSED * block.largest)
    if method not in FITTED:
        moments = FLOAT * MOMENTS.get(method, 0) * block.widest**2
        return {"block": weights, "moments": moments, "step": max(passing, largest)}
    adapter = 0 if method == "omniquant" else block.adapter
    trained = 2 * block.groups + adapter + block.moving
    kept = FLOAT * TRANSFORMED * block.weights if method == "omniquant" else 0
    return {
        "block": weights,
        "grids and adapters": FLOAT * (4 * block.groups + adapter + block.moving),
        "optimizer": FLOAT * (2 + GUARD) * trained,
        "step": max(work.peak + kept, passing, largest),
    }


def allocator(small: int, block: BlockSizes, weight_bytes: int, blocks: int) -> int:
    """Bytes of freed memory that the C library keeps on a CPU while block after block comes and goes.

    Not derived but measured: as much again as is alive in small tensors, or the weights of a few blocks.

    Args:
        small: bytes alive in tensors of less than SMALL bytes.
        block: sizes of the largest block.
        weight_bytes: bytes of a weight while it is computed with.
        blocks: number of blocks.
    """
    return max(small, min(blocks, KEPT) * block.small * weight_bytes) if blocks > 1 else 0


def host(work: dict[str, int], embeddings: int, one_set: int) -> dict[str, int]:
    """Bytes in RAM of the worse of two moments: the embeddings make X at the start, or a block is solved.

    Args:
        work: bytes in RAM while a block is solved, by what they are for.
        embeddings: bytes of everything outside the blocks.
        one_set: bytes of one set of activations.
    """
    start = {"embeddings": embeddings, "activations": one_set}
    return worse(start, work)


def worse(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Of two moments, given by part, the one that takes more; the second where they are even."""
    return one if sum(one.values()) > sum(other.values()) else other


def home(wanted: str, sets: int, gpu: int | None, ram: int) -> str:
    """Where the activations will live: `gpu`, `ram` or `disk`, by the rule of `apiq.blocks.activations.choose_home`.

    Args:
        wanted: quantize.activations.
        sets: bytes of the copies that the walk reckons with.
        gpu: free bytes there; None on a CPU.
        ram: free bytes there.
    """
    if wanted == "disk":
        return "disk"
    if wanted != "auto":
        return "gpu" if wanted == "device" and gpu is not None else "ram"
    if gpu is not None and sets <= gpu // 2:
        return "gpu"
    return "ram" if sets <= ram // 2 else "disk"


def activations(windows: int, length: int, width: int, item_bytes: int) -> int:
    """Bytes of one set of hidden states (windows, length, width)."""
    return windows * length * width * item_bytes


def copies_alive(method: str, second_term: bool, widening: float) -> float:
    """Sets of activations alive at a time, in units of one set as wide as the hidden states.

    X, Xq, the targets and, while a block is solved, the target of the second term or, after it, the next
    Xq. Layer by layer, the inputs of one linear in both models join X, Xq and the targets; a linear that reads
    the inside of the block is `widening` times as wide. Rounding needs none of them, but where there are
    calibration windows, as in the pipeline, the error of each block is measured.
    """
    if method == "apiq-lw":
        return 3 + 2 * widening
    return 5 if second_term and method == "apiq-bw" else 4


def work_folder(packed: int, adapters: int, one_set: int, mapped: int) -> int:
    """Bytes that unfinished work takes on disk: finished blocks, X and Xq before and after the block, mapped files."""
    return packed + adapters + 4 * one_set + mapped


def training(
    packed: int, outside: int, item_bytes: int, adapter: int, moments: int, work: Pass, blocks: int, entry: int,
    head: int, checkpointing: bool, dequantized: int,
) -> dict[str, int]:  # fmt: skip
    """Bytes on the device to finetune: the frozen packed model, its adapters with AdamW, one batch.

    Without checkpointing every block keeps its activations; with it every block keeps its input only, and one
    at a time computes the rest again. The logits come on top of what the blocks keep.

    Args:
        packed: bytes of the packed blocks.
        outside: parameters outside the blocks, in the precision of the arithmetic.
        item_bytes: bytes of a number in that precision.
        adapter: adapter parameters of the whole model.
        moments: bytes of both moments of one of them.
        work: forward and backward of one packed block.
        blocks: number of blocks.
        entry: bytes of the hidden states of a batch.
        head: most bytes alive at a time in logits and loss.
        checkpointing: whether activations are computed again in the backward pass.
        dequantized: bytes of the largest linear while it is dequantized.
    """
    kept = blocks * (entry if checkpointing else work.kept)
    top = max(head, work.peak - (0 if checkpointing else work.kept))
    return {
        "packed model": packed + outside * item_bytes,
        "adapters and optimizer": (2 * FLOAT + moments) * adapter,
        "activations": kept,
        "step": max(top, dequantized),
    }
