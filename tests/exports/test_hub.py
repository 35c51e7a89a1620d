"""The card is made from the folder and nothing else; what is pushed is what is there, in one commit."""

import hashlib
import json
import re
import shutil
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
import yaml
from huggingface_hub import constants

import apiq
from apiq.checkpoint.card import card
from apiq.errors import ApiqError
from apiq.exports.hub import push_to_hub
from apiq.files import sha256_folder
from tests.exports.hub_stand_in import Hub


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "stand-in")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.commits, server.refuses = [], [], None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def endpoint(hub):
    return f"http://127.0.0.1:{hub.server_port}"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint(method="apiq-bw", bits=2), tmp_path / "quantized")


def codes(text):
    """The snippets of a card."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_what_is_pushed_is_the_folder_with_its_card(folder, hub, tmp_path):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"quantized": {"perplexity": {"wikitext2": 7.5}}}))
    before = sha256_folder(folder)
    url = push_to_hub(folder, "me/tiny", private=True, base_model="them/big", metrics=metrics, endpoint=endpoint(hub))
    assert url.endswith("/me/tiny/commit/" + "1" * 40)
    assert [(asked["name"], asked["visibility"]) for asked in hub.created] == [("tiny", "private")]
    ((header, files),) = hub.commits
    assert header["summary"] == "Upload with apiq"
    assert sha256_folder(folder) == before and "adapter/adapter_model.safetensors" in files
    text = card(folder, "them/big", {"quantized": {"perplexity": {"wikitext2": 7.5}}})
    assert "| quantized.perplexity.wikitext2 | 7.5 |" in text
    assert files == before | {"README.md": hashlib.sha256(text.encode()).hexdigest()}


def test_what_evaluate_prints_goes_on_the_card_without_how_it_was_measured(folder, hub, tmp_path):
    printed = {
        "kind": "quantized", "model": "quantized", "perplexity": 7.5, "tasks": {"copa": {"acc": 0.5}},
        "protocol": {"perplexity": {"text": {"length": 2048, "windows": 141}}, "tasks": {"copa": {"documents": 100}}},
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(printed))
    push_to_hub(folder, "me/tiny", metrics=tmp_path / "metrics.json", endpoint=endpoint(hub))
    ((_, files),) = hub.commits
    expected = card(folder, None, {"perplexity": 7.5, "tasks": {"copa": {"acc": 0.5}}})
    assert "| tasks.copa.acc | 0.5 |" in expected and "protocol" not in expected
    assert files["README.md"] == hashlib.sha256(expected.encode()).hexdigest()


def test_metrics_without_names_are_refused(folder, hub, tmp_path):
    (tmp_path / "metrics.json").write_text("[7.5]")
    with pytest.raises(ApiqError, match=r"metrics\.json holds no metrics by name; write it with apiq evaluate"):
        push_to_hub(folder, "me/tiny", metrics=tmp_path / "metrics.json", endpoint=endpoint(hub))
    assert not hub.created


def test_a_damaged_folder_is_not_pushed(folder, hub):
    (folder / "rest.safetensors").write_bytes(b"")
    with pytest.raises(ApiqError, match=r"rest\.safetensors is damaged"):
        push_to_hub(folder, "me/tiny", endpoint=endpoint(hub))
    assert not hub.created


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_the_hub_is_one_sentence(folder, hub, status):
    hub.refuses = status
    with pytest.raises(ApiqError, match=r"me/tiny cannot be written on the hub: .*`hf auth login`") as caught:
        push_to_hub(folder, "me/tiny", endpoint=endpoint(hub))
    assert str(caught.value).count(". ") == 0


def test_offline_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ApiqError, match="me/tiny cannot be written on the hub"):
        push_to_hub(folder, "me/tiny")


def test_the_card_tells_the_run_and_is_the_same_each_time(folder, tmp_path):
    text = card(folder, "them/big-7b")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "them/big-7b" and metadata["pipeline_tag"] == "text-generation"
    for row in (
        "| method | apiq-bw |",
        "| bits | 2 |",
        "| group_size | 32 |",
        "| rank | 4 |",
        "| epochs | 1 |",
        "| calibration windows | 4 |",
    ):
        assert row in text
    total = json.loads((folder / "metrics.json").read_text())["effective_bits"]
    assert f"| total bits per weight | {total:.4g} |" in text
    assert card(shutil.copytree(folder, tmp_path / "elsewhere"), "them/big-7b") == text
    assert (folder / "README.md").read_text() == card(folder)
    assert str(tmp_path) not in text and not re.search(r"\b20\d\d-\d\d-\d\d|\n{4,}", text)


@pytest.mark.parametrize(
    ("format", "says"), [("gptq-v2", "GPTQModel.load"), ("compressed-tensors", "vLLM"), ("dense", "in full")]
)
def test_an_export_has_a_card_too(folder, tmp_path, format, says):
    apiq.export(folder, tmp_path / "out", format)
    assert says in card(tmp_path / "out")


def test_the_code_on_the_card_runs(folder, monkeypatch):
    code = re.search(r"```python\n(.*?)```", card(folder), re.DOTALL)[1]
    names = {}
    exec(code.replace("FOLDER", str(folder)), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


def test_both_ways_on_the_card_load_the_adapter_as_it_is(folder, windows):
    found = []
    for code in codes(card(folder)):
        names = {}
        exec(code.replace("FOLDER", str(folder)), names)
        found.append(names["model"](windows).logits)
    assert len(found) == 2 and torch.equal(*found)


def test_of_an_adapter_in_few_bits_the_card_does_not_say_that_peft_reads_it(folder, tmp_path):
    apiq.export(folder, tmp_path / "out", "apiq", adapter_bits=4)
    text = card(tmp_path / "out")
    assert "in few bits; `apiq.load` puts it on" in text
    assert len(codes(text)) == 1 and "PeftModel" not in text


def test_a_folder_without_a_model_has_no_card(tmp_path):
    with pytest.raises(ApiqError, match="holds no model"):
        card(tmp_path)
