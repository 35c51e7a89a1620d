"""Adapters merged into dense weights change nothing; merged into a few bits they cost what is said."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import apiq
from apiq.checkpoint import manifest
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.evaluation.perplexity import perplexity
from apiq.exports.merge import requantize
from apiq.exports.merging import Merger
from apiq.files import read_json, write_json
from apiq.layers.packed import PackedLinear

ADAPTERS = [
    {"adapter": "rslora", "adapter_targets": ["q_proj", "v_proj"]},
    {"adapter": "dora"},
    {"adapter": "vera"},
    {"adapter": "ia3"},
]


@pytest.fixture
def finetuned(tmp_path, checkpoint):
    """Adapters that were moved after the checkpoint was made, in a finetuned folder of their own."""

    def make(**values):
        base = checkpoint(**{"method": "qlora", "bits": 2, **values})
        folder = tmp_path / "finetuned"
        (folder / "adapter").mkdir(parents=True)
        state = load_file(base / "adapter/adapter_model.safetensors")
        generator = torch.Generator().manual_seed(1)
        moved = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
        save_file(moved, folder / "adapter/adapter_model.safetensors")
        config = read_json(base / "adapter/adapter_config.json")
        write_json(folder / "adapter/adapter_config.json", config)
        manifest.write(folder, "finetuned", base=str(base))
        return folder

    return make


@pytest.mark.parametrize("values", ADAPTERS, ids=lambda values: values["adapter"])
def test_the_merged_model_is_the_model_with_its_adapter(finetuned, agree, tmp_path, values):
    folder = finetuned(**values)
    apiq.merge(folder, tmp_path / "out")
    agree(folder, AutoModelForCausalLM.from_pretrained(tmp_path / "out"), adapters=True)
    assert not (tmp_path / "out/adapter").exists()


def test_the_sum_is_rounded_once(finetuned, tmp_path):
    folder = finetuned()
    apiq.merge(folder, tmp_path / "out", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    layer = load(folder, device="cpu").model.base_model.model.model.layers[1].mlp.up_proj
    assert isinstance(layer.base_layer, PackedLinear)
    total = layer.base_layer.dequantized() + layer.get_delta_weight("default")
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight, total.bfloat16())


def test_back_into_few_bits_at_a_stated_loss(checkpoint, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    folder = checkpoint(method="apiq-bw", bits=2, epochs=3, lr_adapter=0.01)
    result = requantize(folder, tmp_path / "out", windows)
    again = load(tmp_path / "out", device="cpu")
    assert result["perplexity_before"] == pytest.approx(perplexity(load(folder, device="cpu").model, windows), rel=1e-6)
    assert result["perplexity_after"] == pytest.approx(perplexity(again.model, windows), rel=1e-6)
    assert result["bits"]["adapters"] == 0 and again.kind == "quantized"
    assert read_json(tmp_path / "out/config.json")["quantization_config"]["group_size"] == 32
    packed, dense = again.model.model.layers[0].mlp.up_proj, load(folder, device="cpu").model
    layer = dense.base_model.model.model.layers[0].mlp.up_proj
    W = layer.base_layer.dequantized() + layer.get_delta_weight("default")
    _, s, _ = packed.unpacked()
    assert bool(((packed.dequantized() - W).abs() <= 0.51 * s.repeat_interleave(32, 1)).all())
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"method": "rtn"}, "has no adapters to merge; use apiq export --format dense"),
        ({"method": "qlora", "bits": 2, "adapter": "houlsby"}, "HOULSBY are no change of the weight"),
    ],
    ids=["none", "houlsby"],
)
def test_what_cannot_be_merged_is_refused(checkpoint, tmp_path, values, match):
    with pytest.raises(ApiqError, match=match):
        apiq.merge(checkpoint(**values), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "method", "match"),
    [
        ({"method": "apiq-bw", "bits": 2}, "apiq-lw", "it should be awq, gptq, omniquant, rtn"),
        ({"method": "qlora", "bits": 2}, "rtn", "no NormalFloat levels"),
        ({"method": "apiq-bw", "bits": 2}, "gptq", "needs calibration windows"),
    ],
)
def test_what_cannot_be_merged_into_few_bits_is_refused(
    checkpoint, windows, tmp_path, monkeypatch, values, method, match
):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    with pytest.raises(ApiqError, match=match):
        requantize(checkpoint(**values), tmp_path / "out", windows, method)
    assert not (tmp_path / "out").exists()


def test_an_adapter_outside_the_packed_linears_is_not_lost_in_silence(finetuned, checkpoint, tmp_path):
    from apiq.exports.source import open_source

    source = open_source(finetuned())
    merger = Merger(source.adapter)
    merger.state["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    with pytest.raises(ApiqError, match=r"trains lm_head\.lora_A\.weight, which is no packed linear"):
        merger.refuse_strays(source)
