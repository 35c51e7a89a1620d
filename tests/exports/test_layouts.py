"""Weights that transformers keeps transposed are written so; those that it keeps fused are refused."""

import warnings

import pytest
import torch
import transformers as hf
from peft import PeftModel
from transformers import AutoModelForCausalLM

import apiq
from apiq.errors import ApiqError
from tests.exports.conftest import VOCABULARY

_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.15}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tiny model of this config."""

    def folder_of(config):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture(scope="module")
def transposed(folder_of, checkpoint):
    """A GPT-2 in 2 bits with fitted adapters; its linears are Conv1D in transformers, with weights (in, out)."""
    model = folder_of(hf.GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64))

    def make(**values):
        return checkpoint(model, **{"method": "apiq-bw", "bits": 2, "lr_adapter": 0.05, **values})

    return make


@pytest.fixture(scope="module")
def fused(folder_of, checkpoint):
    """A mixture of experts in 2 bits with adapters; transformers keeps its experts in one tensor."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.MixtralConfig(**_SMALL, **shape, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2)
    return checkpoint(folder_of(config), method="loftq", bits=2)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_merged_gpt2_is_the_model_with_its_adapter(transposed, agree, tmp_path, adapter):
    folder = transposed(adapter=adapter)
    apiq.merge(folder, tmp_path / "out")
    agree(folder, AutoModelForCausalLM.from_pretrained(tmp_path / "out"), adapters=True)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_dense_gpt2_is_the_model_with_and_without_its_adapter(transposed, agree, tmp_path, adapter):
    folder = transposed(adapter=adapter)
    apiq.export(folder, tmp_path / "out", "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    agree(folder, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # PEFT sets it
        agree(folder, PeftModel.from_pretrained(model, str(tmp_path / "out/adapter")), adapters=True)


def test_what_peft_puts_on_conv1d_in_another_way_is_refused(transposed, agree, tmp_path):
    folder = transposed(adapter="vera")
    with pytest.raises(ApiqError, match="adapters of type VERA are not what they were; put the adapter into"):
        apiq.export(folder, tmp_path / "dense", "dense")
    assert not list(tmp_path.iterdir())
    apiq.merge(folder, tmp_path / "out")
    agree(folder, AutoModelForCausalLM.from_pretrained(tmp_path / "out"), adapters=True)


def test_engines_do_not_get_conv1d(transposed, tmp_path):
    with pytest.raises(ApiqError, match=r"c_attn is a Conv1D in GPT2 models .* export with --format dense"):
        apiq.export(transposed(), tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_fused_experts_are_refused_before_anything_is_written(fused, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    for attempt in (
        lambda: apiq.merge(fused, tmp_path / "out"),
        lambda: apiq.export(fused, tmp_path / "out", "dense"),
    ):
        with pytest.raises(ApiqError, match="part of a fused tensor in Mixtral models"):
            attempt()
    assert not list(tmp_path.iterdir())
