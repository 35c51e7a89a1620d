"""How large the checkpoint will be, to the byte where it matters, and its effective bits.

The packed linears and the adapters are made on the meta device by the very code that makes the real ones, so
their shapes are those of the files.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apiq.adapters.configuration import targets
from apiq.adapters.injection import Adapters, model_state
from apiq.adapters.targets import Shapes
from apiq.adapters.targets import shapes as linear_shapes
from apiq.adapters.tuners import TUNERS
from apiq.blocks.architecture import linears, replace
from apiq.checkpoint.accounting import PARTS, Bits
from apiq.checkpoint.layout import REST, block_file
from apiq.checkpoint.writing import stored
from apiq.layers.packed import SCALE_PARTS, PackedLinear
from apiq.methods import build
from apiq.methods.budget import Candidate
from apiq.methods.budgeted import Choice, choices, divided, offered
from apiq.methods.grid import packed_bits
from apiq.params import QuantizeParams
from apiq.planning.outline import Outline

_NAMES = {
    torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.uint8: "U8",
}  # fmt: skip
_ORDER = list(_NAMES)
"""Tensors stand in a file in this order of their types, and by name within one."""
_MANIFEST_LINE = 110
"""Bytes that the manifest spends on a file: its name and its SHA-256."""
_SETTINGS = 4096
"""Bytes of the small files together: configurations, metrics, the rest of the manifest."""


@dataclass(frozen=True)
class Result:
    """What the folder of a quantized model will hold."""

    bits: Bits
    blocks: list[int]
    """Bytes of each block file."""
    rest: int
    """Bytes of what lies outside the blocks."""
    adapter: int
    """Bytes of the adapters."""
    beside: int
    """Bytes of the index, the manifest, the metrics and the tokenizer, about."""
    trained: int
    """Number of adapter parameters."""

    @property
    def packed(self) -> int:
        """Bytes of the weights without adapters."""
        return sum(self.blocks) + self.rest

    @property
    def total(self) -> int:
        """Bytes of the whole folder."""
        return self.packed + self.adapter + self.beside


@dataclass(frozen=True)
class PackedBlock:
    """A block as it will be deployed, on the meta device."""

    module: nn.Module
    shapes: dict[str, tuple[int, int]]
    """(out, in) of each packed linear by its name inside the block."""
    tensors: dict[str, Tensor]
    """What its file holds, by name inside the block."""
    adapters: dict[str, Tensor]
    """Its adapter parameters, by name inside the block."""

    def bits(self, part: str) -> int:
        """Bits that `codes`, `scales` or `zeros` of all linears take."""
        found = (self.tensors.get(f"{name}.{tensor}") for name in self.shapes for tensor in PARTS[part])
        return sum(8 * tensor.nbytes for tensor in found if tensor is not None)


def packed_block(block: nn.Module, params: QuantizeParams, storage: torch.dtype) -> PackedBlock:
    """Pack a block of the meta device as `apiq.blocks.walk.deploy` does; `block` stays as it is."""
    block = copy.deepcopy(block)
    found = linears(block)
    shapes = linear_shapes(found)
    chosen = _chosen(shapes, params)
    with torch.device("meta"):
        for name, linear in found.items():
            grid, biased = chosen[name].grid, linear.bias is not None
            replace(block, name, PackedLinear(linear.in_features, linear.out_features, grid, biased, storage))
    tensors = {name: _stored(name, value, storage) for name, value in block.state_dict().items()}
    adapters: dict[str, Tensor] = {}
    if build(params).adapted:
        ranks = {name: choice.rank for name, choice in chosen.items()} if params.candidate_ranks else {}
        state = Adapters(block, params, shapes, seed=0, ranks=ranks).state()
        adapters = {name: stored(value, storage) for name, value in state.items()}
    return PackedBlock(block, shapes, tensors, adapters)


def _chosen(shapes: Shapes, params: QuantizeParams) -> dict[str, Choice]:
    """Grid and rank of each linear.

    Where they are divided, as if each bit of a weight divided its error by 4 everywhere, and each rank took an even
    share of it. What they really do only the weights tell, but all linears together take what they may either way.
    """
    options = choices(params)
    if not params.divided:
        return dict.fromkeys(shapes, options[0])
    carriers = targets(params, shapes, strict=False) if params.candidate_ranks else ()
    offers: dict[str, list[Candidate]] = {}
    for name, shape in shapes.items():
        weights = math.prod(shape)
        costs = [
            weights * 4.0 ** (-packed_bits(shape, grid) / weights) * (1 - rank / min(shape) / 2)
            for grid, rank in options
        ]
        offers[name] = offered(shape, params, costs, name in carriers)
    chosen = divided(offers, params, shapes)
    return {name: options[number] for name, number in chosen.items()}


def result_size(outline: Outline, params: QuantizeParams) -> Result:
    """Effective bits, counted as `apiq.checkpoint.accounting.effective_bits` counts them on the files, and bytes."""
    spent, weights = dict.fromkeys((*PARTS, "adapters"), 0), 0
    files, shapes, fitted = {}, {}, {}
    for block, indices in outline.kinds():
        packed = packed_block(block, params, outline.storage)
        for part in PARTS:
            spent[part] += packed.bits(part) * len(indices)
        weights += sum(math.prod(shape) for shape in packed.shapes.values()) * len(indices)
        for index in indices:
            prefix = f"{outline.blocks.path}.{index}"
            files[index] = {f"{prefix}.{name}": value for name, value in packed.tensors.items()}
            shapes |= {f"{prefix}.{name}": shape for name, shape in packed.shapes.items()}
            fitted[index] = packed.adapters
    rest = {name: _stored(name, value, outline.storage) for name, value in outline.outside().items()}
    adapters: dict[str, Tensor] = {}
    if any(fitted.values()):
        blocks = [fitted[index] for index in sorted(fitted)]
        adapters = model_state(outline.blocks.path, blocks, TUNERS[params.adapter])
    spent["adapters"] = 8 * sum(value.nbytes for value in adapters.values())
    parts = {part: bits / weights for part, bits in spent.items()}
    return Result(
        bits=Bits(**parts, total=sum(parts.values()), weights=weights),
        blocks=[safetensors_bytes(files[index], {"format": "pt"}) for index in sorted(files)],
        rest=safetensors_bytes(rest, {"format": "pt"}),
        adapter=safetensors_bytes(adapters, None) if adapters else 0,
        beside=_beside(files, rest, shapes, params) + (outline.tokenizer_bytes or 0),
        trained=sum(value.numel() for value in adapters.values()),
    )


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> int:
    """Size of a safetensors file: 8 bytes, a JSON header padded to a multiple of 8, and the data."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, value in sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0])):
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(length / 8) * 8 + end


def _stored(name: str, value: Tensor, storage: torch.dtype) -> Tensor:
    return value.detach() if name.rpartition(".")[2] in SCALE_PARTS else stored(value.detach(), storage)


def _beside(
    files: Mapping[int, Mapping[str, Tensor]], rest: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]],
    params: QuantizeParams,
) -> int:  # fmt: skip
    """Bytes of the index, exact, and of the small files beside it, about."""
    places = {name: block_file(index) for index, tensors in files.items() for name in tensors}
    places |= dict.fromkeys(rest, REST)
    index = {"metadata": {"total_size": 10**9, "shapes": {name: list(s) for name, s in shapes.items()}}}
    text = json.dumps({**index, "weight_map": places}, indent=2)
    curves = len(files) * {"omniquant": 1, "apiq-bw": 1, "apiq-lw": len(shapes) // len(files)}.get(params.method, 0)
    losses = 40 * curves * (params.epochs + 1)
    return len(text) + (len(files) + 12) * _MANIFEST_LINE + 120 * len(files) + losses + _SETTINGS
