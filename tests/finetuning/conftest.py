"""A tiny model that is quantized, with adapters, and text for it."""

import json
import random
import string

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.checkpoint import manifest
from apiq.params import FinetuneParams

WORDS = ["<s>", *string.ascii_lowercase, "</s>", "<unk>"]


@pytest.fixture(scope="session")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def quantized(tokenizer, tmp_path_factory):
    """A folder with a model and adapters."""
    folder = tmp_path_factory.mktemp("made") / "quantized"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape))
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index("<unk>")] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    manifest.write(folder, "quantized")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Letters that are followed by one of the next two: 40 windows of 16 tokens."""
    draw, letters = random.Random(0), [0]
    while len(letters) < 40 * 16 - 1:  # and the leading <s>
        letters.append((letters[-1] + draw.choice([1, 2])) % 26)
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(" ".join(string.ascii_lowercase[letter] for letter in letters))
    return path


@pytest.fixture(scope="session")
def params(text):
    """12 steps, measured after 4, 8 and 12."""
    return FinetuneParams(
        text=str(text),
        length=16,
        held_out=0.2,
        epochs=3,
        batch_size=4,
        accumulation=2,
        learning_rate=0.03,
        checkpoints=3,
    )


@pytest.fixture
def pairs(tmp_path):
    """Six usable pairs, of which one is cut off at 8 tokens, one whose prompt fills them, one without an answer."""
    rows = [{"prompt": f"{a} b", "answer": "c d"} for a in "efghi"]
    rows += [
        {"prompt": "a b", "answer": "c d e f g h"},
        {"prompt": "a " * 9, "answer": "b"},
        {"prompt": "a", "answer": " "},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    monkeypatch.setenv("APIQ_WORK", str(folder))
    return folder
