"""A configuration that transformers does not know by itself is refused in one sentence; code in a folder is not run."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.checkpoint.loading import full_precision, load, read_tokenizer
from apiq.errors import ApiqError

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CODE = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Words", None]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **SHAPE)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A model whose folder holds code that must not run, and a user who would agree to anything."""
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    return folder


def say(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("values", [{}, {"auto_map": CODE}], ids=["unknown", "code"])
def test_an_unknown_type_is_refused_in_one_sentence(folder, values):
    say(folder / "config.json", model_type="novel", **values)
    for attempt in (load, full_precision):
        with pytest.raises(ApiqError, match=r"of type novel, which transformers [\d.]+ does not know") as refusal:
            attempt(folder)
        said = str(refusal.value)
        assert "trust_remote_code" not in said and "\n" not in said and said.count(". ") == 0


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": None}, r"config\.json names no model_type"),
        ({"hidden_size": "wide"}, r"config\.json cannot be read: .*hidden_size"),
        ({"num_attention_heads": 0}, r"config\.json cannot be read: integer"),
    ],
    ids=["none", "words", "zero"],
)
def test_nonsense_in_it_is_one_sentence(folder, values, match):
    say(folder / "config.json", **values)
    with pytest.raises(ApiqError, match=match):
        load(folder)


def test_a_known_type_is_made_by_transformers_whatever_code_lies_beside(folder, whole):
    say(folder / "config.json", auto_map=CODE)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(
            load(folder, device="cpu").model(tokens).logits, load(whole, device="cpu").model(tokens).logits
        )
    assert not hasattr(full_precision(folder).stream.model.config, "auto_map")


def test_a_tokenizer_of_its_own_code_is_refused(folder):
    say(folder / "tokenizer_config.json", auto_map=CODE, tokenizer_class="Words")
    with pytest.raises(ApiqError, match=r"no tokenizer that can be read: .*custom code") as refusal:
        read_tokenizer(folder)
    assert "trust_remote_code" not in str(refusal.value)
