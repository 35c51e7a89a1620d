"""A tiny Llama in a folder, its calibration windows, and what a quantization of it leaves."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import apiq.blocks.walk as walk_module
from apiq.params import QuantizeParams
from apiq.quantization import quantize

VOCABULARY = 61


def settings(**values):
    return QuantizeParams(
        **{"recipe": "paper", "bits": 2, "group_size": 16, "rank": 4, "alpha": 8.0, "epochs": 6, "batch_size": 2,
           "lr_theta": 0.02, "lr_adapter": 0.01, "decay_adapter": 0.0, **values}
    )  # fmt: skip


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def windows():
    return torch.randint(0, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))


@dataclass
class Made:
    """A checkpoint, and the model as it was when its blocks had just been fitted."""

    folder: Path
    losses: list[float]
    """Of each block, deployed."""
    fitted: nn.Module


@pytest.fixture(scope="session")
def make(original, windows, tmp_path_factory):
    """Quantize the tiny model with some settings, once a session for each."""
    done: dict[str, Made] = {}

    def make(**values):
        params = settings(**values)
        key = params.model_dump_json()
        if key not in done:
            done[key] = _made(original, windows, params, tmp_path_factory.mktemp("made"))
        return done[key]

    return make


def _made(original, windows, params, place):
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    deploy = walk_module.deploy

    def keep(block, *rest):
        kept.append(copy.deepcopy(block))
        return deploy(block, *rest)

    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APIQ_WORK", str(place / "work"))
        patch.setattr(walk_module, "deploy", keep)
        result = quantize(original, windows, params, place / "quantized")
    for index, block in enumerate(kept):
        model.model.layers[index] = block
    return Made(place / "quantized", [block["loss_last"] for block in result["blocks"]], model)
