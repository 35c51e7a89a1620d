"""Nothing damaged, half-written or impossible is answered with a model; one sentence says what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apiq.blocks.capture import PADDING
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.params import QuantizeParams
from apiq.quantization import quantize


@pytest.fixture
def folder(make):
    return make()[0]


def refused(folder, match):
    """By our loader and by transformers' own."""
    with pytest.raises(ApiqError, match=match) as caught:
        load(folder, device="cpu")
    with pytest.raises(ApiqError, match=match):
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(caught.value).count(". ") == 0  # one sentence


@pytest.mark.parametrize("name", ["block-001.safetensors", "rest.safetensors", "adapter/adapter_model.safetensors"])
def test_one_flipped_bit(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, rf"{name} is damaged")


def test_a_truncated_file(folder):
    path = folder / "block-000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"block-000\.safetensors is damaged")


def test_a_missing_shard(folder):
    (folder / "block-001.safetensors").unlink()
    with pytest.raises(ApiqError, match=r"block-001\.safetensors is missing"):
        load(folder, device="cpu")
    with pytest.raises((ApiqError, OSError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_without_its_weights(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ApiqError, match="is missing"):
        load(folder, device="cpu")
    with pytest.raises((ApiqError, OSError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_without_its_manifest(folder):
    (folder / "apiq.json").unlink()
    refused(folder, r"half|no apiq\.json")


def test_a_tensor_that_is_not_there(folder):
    """Even with hashes that fit: transformers alone would make the tensor up."""
    path = folder / "block-000.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, path, metadata={"format": "pt"})
    from apiq.checkpoint import manifest

    (folder / "apiq.json").unlink()
    manifest.write(folder, "quantized")
    refused(folder, r"no tensor model\.layers\.0\.mlp\.up_proj\.scales")


def test_a_newer_format(folder):
    facts = json.loads((folder / "apiq.json").read_text())
    (folder / "apiq.json").write_text(json.dumps({**facts, "format": 99}))
    refused(folder, "format 99")


def test_a_quantized_model_is_not_quantized_again(folder, windows, tmp_path):
    with pytest.raises(ApiqError, match="quantized already"):
        quantize(folder, windows, QuantizeParams(), tmp_path / "again")


def broken_copy(original, tmp_path, name, value):
    copy = tmp_path / "broken"
    shutil.copytree(original, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["rtn", "apiq-lw", "apiq-bw"])
def test_a_weight_that_is_not_finite(original, windows, tmp_path, work, value, method):
    copy = broken_copy(original, tmp_path, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(ApiqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* not finite"):
        quantize(copy, windows, QuantizeParams(method=method, rank=4, epochs=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("values", "rows", "length", "match"),
    [
        ({"rank": 25}, 61, 16, r"quantize\.rank is 25; it must be at most 24"),
        ({}, 61, 33, r"calibration\.length is 33; it must be at most 32"),
        ({}, 500, 16, r"token \d+, the model knows 61"),
    ],
)
def test_what_does_not_fit_the_model(original, tmp_path, work, values, rows, length, match):
    tokens = torch.arange(2 * length).reshape(2, length) % rows + (rows - 61)
    params = QuantizeParams(**{"rank": 4, "epochs": 1, **values})
    with pytest.raises(ApiqError, match=match):
        quantize(original, tokens, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (torch.zeros(0, 16, dtype=torch.long), r"windows are torch\.int64 of shape \(0, 16\)"),
        (torch.zeros(16, dtype=torch.long), r"of shape \(16,\); they must be token ids of shape \(windows, length\)"),
        (torch.zeros(2, 16), r"windows are torch\.float32"),
        (torch.full((2, 16), PADDING), "hold at least one token"),
        (torch.full((2, 16), -7), "hold token -7"),
    ],
)
def test_windows_that_are_none(original, tmp_path, work, tokens, match):
    with pytest.raises(ApiqError, match=match):
        quantize(original, tokens, QuantizeParams(rank=4, epochs=1), tmp_path / "out")


@pytest.mark.parametrize("method", ["rtn", "apiq-bw"])
def test_a_weight_for_which_no_scale_is_large_enough(original, windows, tmp_path, work, method):
    copy = broken_copy(original, tmp_path, "model.layers.1.mlp.up_proj.weight", -1e6)
    with pytest.raises(ApiqError, match=r"up_proj\.weight of the model holds a value of 1e\+06, beyond 32752"):
        quantize(copy, windows, QuantizeParams(method=method, rank=4, epochs=1), tmp_path / "out")


def test_an_adapted_method_without_windows(original, tmp_path, work):
    with pytest.raises(ApiqError, match="needs calibration windows"):
        quantize(original, None, QuantizeParams(), tmp_path / "out")


@pytest.fixture
def unlisted(original, make, tmp_path):
    """The full-precision model with adapters beside it, in a folder without apiq.json."""
    plain = shutil.copytree(original, tmp_path / "plain")
    shutil.copytree(make()[0] / "adapter", plain / "adapter")
    return plain


def test_a_full_model_whose_weights_have_other_shapes_than_its_config(unlisted):
    config = json.loads((unlisted / "config.json").read_text())
    (unlisted / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ApiqError, match=r"none of the right shape, for model\.layers\.0\.mlp\.down_proj\.weight"):
        load(unlisted, device="cpu")


def test_an_adapter_of_another_model(unlisted):
    load(unlisted, device="cpu")
    path = unlisted / "adapter/adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.7"): value for name, value in load_file(path).items()}, path)
    with pytest.raises(ApiqError, match=r"is the adapter of another model: it has no base_model.*layers\.0\."):
        load(unlisted, device="cpu")
