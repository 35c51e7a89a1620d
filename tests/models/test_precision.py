"""The precision of a checkpoint is that of the weights, whatever config.json says or leaves out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig

from apiq.checkpoint.loading import full_precision
from apiq.models.config import read_config
from apiq.models.precision import declared_dtype, stored_dtype
from apiq.params import ModelParams
from apiq.planning.outline import outline

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path):
    """A model in bfloat16 with a last norm in float32."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **SHAPE)).to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    return tmp_path


def declare(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config | values))


@pytest.mark.parametrize("values", [{}, {"dtype": "float32"}, {"torch_dtype": "float16"}])
def test_most_weights_decide_in_the_work_and_in_the_plan(folder, values):
    declare(folder, **values)
    assert full_precision(folder).dtype == torch.bfloat16
    assert outline(ModelParams(source=str(folder))).storage == torch.bfloat16


def test_whole_numbers_do_not_count(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "ids": torch.zeros(10**6, dtype=torch.int64)}, path, {"format": "pt"})
    assert stored_dtype([path], read_config(folder)) == torch.bfloat16


def test_without_weights_config_json_decides(folder):
    (folder / "model.safetensors").unlink()
    declare(folder, dtype="float16")
    assert outline(ModelParams(source=str(folder))).storage == torch.float16
    declare(folder)
    assert outline(ModelParams(source=str(folder))).storage == torch.float32


def test_a_model_of_text_and_images_may_declare_it_for_the_text():
    text = LlamaConfig(vocab_size=16, **SHAPE, dtype="bfloat16")
    config = LlavaConfig(vision_config=CLIPVisionConfig(**SHAPE), text_config=text)
    assert declared_dtype(config) == torch.bfloat16
