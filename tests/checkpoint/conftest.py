"""A tiny Llama in a folder, with widths that no group size divides, and checkpoints made of it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.params import QuantizeParams
from apiq.quantization import quantize

VOCABULARY = 61


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.15, tie_word_embeddings=True,
        attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def windows():
    return torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder for unfinished work, apart for each test."""
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


def settings(**values):
    return QuantizeParams(
        **{"recipe": "paper", "bits": 2, "group_size": 32, "rank": 4, "epochs": 1, "lr_adapter": 0.01, **values}
    )


@pytest.fixture
def make(original, windows, tmp_path, work):
    """Quantize the tiny model; the folder and what quantize returned."""

    def make(name="quantized", progress=None, **values):
        out = tmp_path / name
        extra = {} if progress is None else {"progress": progress}
        return out, quantize(original, windows, settings(**values), out, **extra)

    return make
