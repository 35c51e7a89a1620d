"""GGUF, the file of llama.cpp: the base in blocks that hold its codes exactly, the adapter as a GGUF LoRA."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiq.adapters.injection import IN_BLOCK
from apiq.checkpoint.adapter_file import read_adapter
from apiq.checkpoint.carried import carry_terms
from apiq.errors import ApiqError
from apiq.exports.gguf_blocks import BLOCK, blocks, fitting
from apiq.exports.gguf_vocabulary import add_vocabulary, check_vocabulary
from apiq.exports.rules import require_uniform
from apiq.exports.shards import cast
from apiq.exports.source import Linear, Source
from apiq.files import read_json

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures of GGUF by the class in transformers."""


def check(source: Source, dtype: torch.dtype) -> None:
    """Llama, Mistral and Qwen models whose codes a type of blocks of 32 holds.

    Raises:
        ApiqError: what the format does not hold, or the package `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ApiqError(
            "--format gguf needs the package gguf, which is not installed; run pip install 'apiq[exports]'."
        )
    require_uniform(source, "GGUF")
    for name, (_, in_features) in source.shapes.items():
        grid = source.grids[name]
        if fitting(grid, in_features) is None:
            raise ApiqError(
                f"no type of GGUF holds the codes of {grid.bits} bits less their zero points exactly; quantize with "
                "quantize.symmetric: true, or with quantize.bits of 7 or less."
            )
        if in_features % BLOCK or grid.width(in_features) % BLOCK:
            raise ApiqError(
                f"the blocks of GGUF have 32 inputs: {name} has {in_features} inputs and groups of "
                f"{grid.width(in_features)}; quantize with a quantize.group_size that is a multiple of 32."
            )
    _check_scales(source)
    _check_model(source)
    check_vocabulary(source.folder)
    if source.adapter is not None:
        _scaling(source.adapter)


def write(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Write model.gguf, the terms of use of the model, and adapter.gguf where there is an adapter."""
    import gguf

    config = source.model_config.get_text_config()
    architecture = _architecture(source)
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    _add_metadata(writer, config)
    kinds = Counter(fitting(source.grids[name], in_features) for name, (_, in_features) in source.shapes.items())
    usual = kinds.most_common(1)[0][0]
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{usual}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, source.folder, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for _, others, linears in source.files():
        for name, value in others.items():
            _add_dense(writer, _name(names, name), _permuted(value, name, config, architecture), dtype)
        for linear in linears:
            _add_linear(writer, _name(names, f"{linear.name}.weight"), linear, config, architecture)
    _close(writer)
    carry_terms(source.folder, folder)
    if source.adapter is not None:
        _write_lora(source, folder / "adapter.gguf", names, config, architecture)


def _architecture(source: Source) -> str:
    return ARCHITECTURES[source.config["architectures"][0]]


def _check_scales(source: Source) -> None:
    """Refuse scales of a balanced grid of which float16 does not hold the half, the smallest it has."""
    if not any(grid.balanced for grid in source.grids.values()):
        return
    for _, _, linears in source.files():
        for linear in linears:
            scales = linear.packed.scales
            if linear.grid.balanced and not torch.equal(scales / 2 * 2, scales):
                raise ApiqError(
                    f"GGUF keeps half of each scale of quantize.symmetric: balanced in float16, in which that of "
                    f"{linear.name} underflows; quantize with quantize.symmetric: true or false, or export with "
                    "--format dense."
                )


def _check_model(source: Source) -> None:
    config, name = source.model_config, (source.config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ApiqError(
            f"the GGUF export knows {', '.join(ARCHITECTURES)}, not {name}; export with --format dense "
            "and convert that with the tools of llama.cpp, or with --format compressed-tensors."
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default" or getattr(config, "sliding_window", None) or getattr(config, "mlp_bias", False):
        raise ApiqError(
            f"the GGUF export knows no rope_type {rope!r}, sliding windows or biases of the feed-forward part, one of "
            "which this model has; export with --format compressed-tensors or dense."
        )


def _add_metadata(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_linear(writer: Any, name: str, linear: Linear, config: Any, architecture: str) -> None:
    import gguf

    kind = fitting(linear.grid, linear.packed.in_features)
    assert kind is not None
    codes, s, z = (_permuted(part, linear.name, config, architecture) for part in linear.parts)
    data = blocks(codes, s, z, linear.grid, kind)
    writer.add_tensor(name, data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))


def _add_dense(writer: Any, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """A matrix in `dtype`; vectors, which llama.cpp wants in float32, in that."""
    import gguf

    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = getattr(gguf.GGMLQuantizationType, types[dtype] if value.dim() > 1 else "F32")
    data = gguf.quants.quantize(cast(value, dtype if value.dim() > 1 else torch.float32, name).float().numpy(), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def _permuted(value: Tensor, name: str, config: Any, architecture: str) -> Tensor:
    """The rows of queries and keys in the order of GGUF's llama, whose rotary embedding turns neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in name.split(".") if part in heads), None)
    if architecture != "llama" or count is None:
        return value
    return value.reshape(count, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _write_lora(source: Source, path: Path, names: Any, config: Any, architecture: str) -> None:
    import gguf

    assert source.adapter is not None
    state = read_adapter(source.adapter)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = next(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _scaling(source.adapter) * rank)
    for key, value in sorted(state.items()):
        linear, part = key.removeprefix(IN_BLOCK).removesuffix(".weight").rsplit(".", 1)
        turned = _permuted(value, linear, config, architecture) if part == "lora_B" else value
        writer.add_tensor(f"{_name(names, f'{linear}.weight')}.{part.lower()}", turned.float().contiguous().numpy())
    _close(writer)


def _scaling(adapter: Path) -> float:
    """What multiplies A B^T.

    Raises:
        ApiqError: the adapter is another one than plain LoRA of one rank.
    """
    config = read_json(adapter / "adapter_config.json")
    plain = config["peft_type"] == "LORA" and not config.get("use_dora")
    if not plain or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ApiqError(
            f"GGUF holds plain LoRA of one rank; the adapter of type {config['peft_type']} in {adapter} is another: "
            "set quantize.adapter: lora and no candidate_ranks, or apiq merge first and convert the dense model."
        )
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def _name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ApiqError(f"GGUF has no name for the tensor {name}; export with --format compressed-tensors or dense.")
    return found


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
