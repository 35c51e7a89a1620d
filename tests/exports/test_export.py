"""Exports hold what the checkpoint holds, or are refused before anything is written."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import apiq
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.exports.run import FORMATS
from apiq.files import sha256_folder

DENSE = [
    {"bits": 3, "group_size": 43},
    {"method": "qlora", "bits": 4},
    {"bits": 1, "symmetric": "balanced"},
    {"bits": 1.58, "group_size": 43},
    {"method": "lq-lora", "target_bits": 3.7, "candidate_group_sizes": [16, 32]},
]


@pytest.mark.parametrize("values", DENSE, ids=str)
def test_dense_weights_are_the_model(checkpoint, agree, tmp_path, values):
    folder = checkpoint(**values)
    result = apiq.export(folder, tmp_path / "out", "dense")
    assert result["dtype"] == "float32" and result["linears"] == 14
    agree(folder, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert load(tmp_path / "out", device="cpu").kind == "full"


def test_the_adapter_lies_beside_in_the_format_of_peft(checkpoint, agree, tmp_path):
    folder = checkpoint(method="apiq-bw", bits=2)
    apiq.export(folder, tmp_path / "out", "dense")
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ".."
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    agree(folder, PeftModel.from_pretrained(model, tmp_path / "out/adapter"), adapters=True)


def test_half_precision_rounds_the_product_once(checkpoint, tmp_path):
    folder = checkpoint(bits=3)
    apiq.export(folder, tmp_path / "out", "dense", dtype="float16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ours = load(folder, device="cpu").model
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = theirs.get_submodule(name).weight
        assert weight.dtype == torch.float16
        assert torch.equal(weight, ours.get_submodule(name).dequantized().half())


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "gguf"])
def test_the_same_export_has_the_same_bytes(checkpoint, tmp_path, format):
    folder = checkpoint(method="apiq-bw", bits=4, symmetric=True)
    for place in ("a", "b/c"):
        apiq.export(folder, tmp_path / place, format)
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b/c")
    texts = [path.read_text() for path in (tmp_path / "a").rglob("*.json")]
    assert len(texts) >= 4 and not any(str(tmp_path) in text or str(folder) in text for text in texts)


REFUSED = [
    ("gptq", {"bits": 4}, {}, r"--format gptq-v2, or .*quantize\.symmetric: true"),
    ("gptq", {"bits": 3, "symmetric": True}, {}, r"4, 8 bits, the model has 3; .*quantize\.bits"),
    ("gptq-v2", {"bits": 5}, {}, r"2, 3, 4, 8 bits, the model has 5"),
    ("gptq-v2", {"bits": 4}, {"dtype": "float32"}, r"--dtype float16"),
    ("gptq-v2", {"group_size": 43}, {}, r"quantize\.group_size is 43"),
    ("awq", {"bits": 3}, {}, r"AWQ holds 4 bits, the model has 3"),
    ("compressed-tensors", {"group_size": 43}, {}, r"has 128 inputs, quantize\.group_size is 43"),
    ("compressed-tensors", {"group_size": 64}, {"dtype": "bfloat16"}, r"--dtype float16 or float32"),
    ("compressed-tensors", {"method": "qlora", "bits": 4}, {}, r"no NormalFloat levels"),
    (
        "compressed-tensors",
        {"bits": 2, "symmetric": "balanced"},
        {},
        r"zero points .* quantize\.symmetric: true or false",
    ),
    ("gptq-v2", {"bits": 2, "symmetric": "balanced"}, {}, r"^GPTQ v2 has whole .* quantize\.symmetric: true or false"),
    (
        "gptq",
        {"symmetric": "balanced"},
        {},
        r"^GPTQ v1 has whole zero points only, .* quantize\.symmetric: true or false",
    ),
    ("awq", {"symmetric": "balanced"}, {}, r"^AWQ has whole zero points only, .* quantize\.symmetric: true or false"),
    ("compressed-tensors", {"bits": 1.58}, {}, r"7, 8 bits, the model has 1\.58; .*quantize\.bits"),
    ("gptq-v2", {"bits": 1.58}, {}, r"2, 3, 4, 8 bits, the model has 1\.58"),
    ("dense", {}, {"dtype": "int8"}, r"dtype is 'int8'"),
    ("onnx", {}, {}, r"there is no format onnx; there are compressed-tensors"),
]


@pytest.mark.parametrize(("format", "values", "options", "match"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    checkpoint, tmp_path, format, values, options, match
):
    with pytest.raises(ApiqError, match=match) as caught:
        apiq.export(checkpoint(**values), tmp_path / "out", format, **options)
    assert str(caught.value).count(". ") == 0 and not list(tmp_path.iterdir())


def test_a_group_of_a_whole_row_in_some_linears_only_is_refused(checkpoint, tmp_path):
    with pytest.raises(ApiqError, match=r"down_proj has 128 inputs|has 64 inputs"):
        apiq.export(checkpoint(group_size=96), tmp_path / "out", "compressed-tensors")


def test_a_damaged_checkpoint_is_not_exported(checkpoint, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint(bits=3), folder)
    path = folder / "block-000.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ApiqError, match="is damaged"):
        apiq.export(folder, tmp_path / "out", "dense")


def test_the_format_of_another_library_is_left_to_it(checkpoint, tmp_path):
    apiq.export(checkpoint(bits=3), tmp_path / "out", "compressed-tensors")
    with pytest.raises(ApiqError, match=r"in the format of compressed-tensors; .* load it with that library"):
        load(tmp_path / "out", device="cpu")
