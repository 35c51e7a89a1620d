"""A tiny Llama in a folder, windows for it, and a checkpoint made of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.params import QuantizeParams
from apiq.quantization import quantize

VOCABULARY = 61


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=43, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def windows():
    return torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder for unfinished work, apart for each test."""
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture(scope="session")
def make(original, windows, tmp_path_factory):
    """Quantize the tiny model; the folder, made once for each setting."""
    made = {}

    def make(**values):
        key = tuple(sorted(values.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "out"
            settings = {"bits": 2, "group_size": 16, "rank": 4, "epochs": 1, **values}
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("APIQ_WORK", str(made[key].parent / "work"))
                quantize(original, windows, QuantizeParams(**settings), made[key])
        return made[key]

    return make
