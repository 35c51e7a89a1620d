"""Pooled adapters merged into zero points change nothing, and need no adapter any more."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import apiq
from apiq.adapters.pooled import spread
from apiq.checkpoint import manifest
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.exports.run import FORMATS
from apiq.exports.zeros import merge_into_zeros
from apiq.files import read_json, sha256_folder, write_json
from apiq.layers import fused
from apiq.layers.packed import PackedLinear
from tests.checkpoint import reader

WEIGHTS = "adapter/adapter_model.safetensors"
GRIDS = {
    "short last group": {"bits": 2, "group_size": 24},
    "a row": {"bits": 3, "group_size": 0, "symmetric": True, "adapter": "rslora"},
    "balanced": {"bits": 2, "group_size": 24, "symmetric": "balanced"},
    "ternary": {"bits": 1.58, "group_size": 24},
    "some linears": {"bits": 2, "adapter_targets": ["q_proj", "down_proj"]},
    "mixed": {"bits": 2, "target_bits": 3.6, "candidate_group_sizes": [24, 40], "sensitivity": "none"},
}


@pytest.fixture
def finetuned(checkpoint, tmp_path):
    """Adapters that were moved, but for `spoiled` alike within groups, in a finetuned folder of their own."""

    def make(spoiled=None, **values):
        base = checkpoint(**{"method": "gptq-lora", "pooled": True, **values})
        folder = tmp_path / "finetuned"
        (folder / "adapter").mkdir(parents=True)
        packed = dict(load(base, device="cpu", adapters=False).model.named_modules())
        generator, moved = torch.Generator().manual_seed(1), {}
        for key, value in load_file(base / WEIGHTS).items():
            change = 0.05 * torch.randn(value.shape, generator=generator)
            if "lora_A" in key:
                width = packed[key.removeprefix("base_model.model.").partition(".lora_A")[0]].grid.width(value.shape[1])
                change = spread(change[:, ::width], width, value.shape[1])
            moved[key] = value + change
            if spoiled is not None and spoiled in key:
                moved[key][1, 2] += 1e-6
        save_file(moved, folder / WEIGHTS)
        shutil.copy(base / "adapter/adapter_config.json", folder / "adapter")
        manifest.write(folder, "finetuned", base=str(base))
        return folder

    return make


@pytest.mark.parametrize("values", GRIDS.values(), ids=GRIDS)
def test_the_merged_model_is_the_model_with_its_adapter(finetuned, agree, tmp_path, values):
    folder, out = finetuned(**values), tmp_path / "out"
    base = manifest.verify(folder)["base"]
    result = merge_into_zeros(folder, out)
    assert not (out / "adapter").exists() and manifest.verify(out)["kind"] == "quantized"
    agree(folder, load(out, device="cpu").model, adapters=True)

    model = load(out, device="cpu").model
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    held = {name: module for name, module in packed.items() if module.grid.offsets}
    assert len(held) == result["linears"] == (4 if "adapter_targets" in values else 14)
    read = reader.read(out)
    for name, linear in packed.items():
        assert np.array_equal(linear.dequantized().numpy().view(np.int32), read[name].view(np.int32))
    spent = 32 * sum(linear.offsets.numel() for linear in held.values())
    before, after = effective_bits(base, adapter=folder / "none"), effective_bits(out)
    assert after.total * after.weights == pytest.approx(before.total * before.weights + spent)
    assert read_json(out / "metrics.json")["bits"] == result["bits"] == after.as_dict()
    for name in [name for name in packed if name not in held] if "adapter_targets" in values else []:
        assert "offsets" not in dict(packed[name].named_buffers())


def test_offsets_keep_their_precision_whatever_the_model_computes_in(finetuned, tmp_path):
    out = tmp_path / "out"
    merge_into_zeros(finetuned(bits=2, group_size=24), out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    linear = model.model.layers[0].mlp.down_proj
    stored = load_file(out / "block-000.safetensors")["model.layers.0.mlp.down_proj.offsets"]
    assert stored.dtype == torch.float32 and bool(stored.any())
    assert torch.equal(linear.offsets, stored)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).model.layers[0].mlp.down_proj
    assert torch.equal(again.offsets, stored)
    assert torch.equal(again.dequantized().bfloat16(), linear.dequantized())
    assert torch.equal(linear.to(torch.float16).offsets, stored)


def test_only_dense_exports_hold_offsets(finetuned, agree, tmp_path):
    out = tmp_path / "out"
    merge_into_zeros(finetuned(bits=4, group_size=32), out)
    apiq.export(out, tmp_path / "dense", "dense")
    agree(out, AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    for format in FORMATS.keys() - {"dense"}:
        with pytest.raises(ApiqError, match=r"whole zero points, and those of model\.layers\.0") as caught:
            apiq.export(out, tmp_path / format, format)
        assert str(caught.value).count(". ") == 0 and not (tmp_path / format).exists()


def test_the_kernel_for_single_tokens_leaves_offsets_to_the_plain_path(finetuned, tmp_path):
    folder = finetuned(bits=2, group_size=24)
    merge_into_zeros(folder, tmp_path / "out")
    X = torch.ones(1, 64)
    with torch.no_grad():
        before = load(folder, device="cpu", adapters=False).model.model.layers[0].self_attn.q_proj
        assert fused._suits(before, X)
        assert not fused._suits(load(tmp_path / "out", device="cpu").model.model.layers[0].self_attn.q_proj, X)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"bits": 2, "group_size": 24, "spoiled": "layers.1.mlp.up_proj.lora_A"},
            r"A of the adapter on model\.layers\.1\.mlp\.up_proj differs within a group .* finetune\.pooled: true",
        ),
        ({"bits": 4, "method": "qlora", "pooled": False}, "NormalFloat levels and no zero points"),
        ({"bits": 2, "pooled": False, "adapter": "dora"}, "is not plain LoRA; merge it with --into dense"),
    ],
    ids=["one number", "normal-float", "dora"],
)
def test_what_does_not_fit_into_zero_points_is_refused(finetuned, tmp_path, values, match):
    folder = finetuned(**values)
    with pytest.raises(ApiqError, match=match) as caught:
        merge_into_zeros(folder, tmp_path / "out")
    assert str(caught.value).count(". ") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["finetuned"]


def test_a_folder_without_adapters_is_refused(checkpoint, tmp_path):
    with pytest.raises(ApiqError, match="has no adapters to merge"):
        merge_into_zeros(checkpoint(method="rtn", bits=2), tmp_path / "out")


def test_damaged_offsets_are_refused(finetuned, tmp_path):
    """Even with hashes that fit."""
    out, name = tmp_path / "out", "model.layers.1.self_attn.v_proj.offsets"
    merge_into_zeros(finetuned(bits=2, group_size=24), out)
    path = out / "block-001.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(ApiqError, match=r"block-001\.safetensors is damaged"):
        load(out, device="cpu")
    for value, match in (
        (None, r"has no tensor .*v_proj\.offsets"),
        (tensors[name][:, 1:], r"v_proj\.offsets has shape \[32, 2\], not \[32, 3\]"),
    ):
        changed = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(changed if value is None else changed | {name: value.contiguous()}, path, metadata={"format": "pt"})
        (out / manifest.NAME).unlink()
        manifest.write(out, "quantized")
        with pytest.raises(ApiqError, match=match):
            load(out, device="cpu")


def test_the_same_merge_writes_the_same_bytes_and_other_folders_are_written_as_before(finetuned, tmp_path):
    folder = finetuned(bits=2, group_size=24)
    base = manifest.verify(folder)["base"]
    assert "offsets" not in json.dumps(read_json(f"{base}/config.json"))
    before = sha256_folder(base)
    merge_into_zeros(folder, tmp_path / "one")
    merge_into_zeros(folder, tmp_path / "two")
    assert sha256_folder(tmp_path / "one") == sha256_folder(tmp_path / "two")
    assert sha256_folder(base) == before
    config = read_json(tmp_path / "one/config.json")["quantization_config"]
    assert config["offsets"] is True and "exceptions" not in config


def test_a_folder_of_format_3_is_still_read(checkpoint, tmp_path):
    shutil.copytree(checkpoint(method="rtn", bits=2), tmp_path / "old")
    facts, config = read_json(tmp_path / "old/apiq.json"), read_json(tmp_path / "old/config.json")
    config["quantization_config"]["format"] = 3
    write_json(tmp_path / "old/config.json", config)
    (tmp_path / "old/apiq.json").unlink()
    manifest.write(tmp_path / "old", "quantized", method=facts["method"])
    write_json(tmp_path / "old/apiq.json", read_json(tmp_path / "old/apiq.json") | {"format": 3})
    assert load(tmp_path / "old", device="cpu").kind == "quantized"
