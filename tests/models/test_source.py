import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.errors import ApiqError
from apiq.files import read_json, sha256
from apiq.models.source import fetch, locate, weight_files
from apiq.params import ModelParams

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny model in Hugging Face format, in two shards."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=6_000)
    (folder / "README.md").write_text("about")
    return folder


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_a_local_folder_is_pinned_by_its_hashes(model, tmp_path):
    found = fetch(ModelParams(source=str(model)), tmp_path / "out")
    assert found == read_json(tmp_path / "out" / "model.json")
    assert found["kind"] == "local" and found["path"] == str(model)
    assert found["files"][shard(model).name] == sha256(shard(model))
    assert "config.json" in found["files"] and "README.md" not in found["files"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.json"]
    assert locate(tmp_path / "out") == model == locate(model)


@pytest.mark.parametrize("name", ["config.json", "shard"])
def test_a_file_changed_after_the_model_stage_is_noticed(model, tmp_path, name):
    fetch(ModelParams(source=str(model)), tmp_path / "out")
    path = shard(model) if name == "shard" else model / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ApiqError, match=f"{path.name} is not the file that model.json describes"):
        locate(tmp_path / "out")


def test_a_file_gone_after_the_model_stage_is_noticed(model, tmp_path):
    fetch(ModelParams(source=str(model)), tmp_path / "out")
    shard(model).unlink()
    with pytest.raises(ApiqError, match="is missing"):
        locate(tmp_path / "out")
    shutil.rmtree(model)
    with pytest.raises(ApiqError, match="is gone"):
        locate(tmp_path / "out")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda m: (m / "config.json").unlink(), "has no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "is not JSON"),
        (lambda m: shard(m).unlink(), "incomplete: model-00001"),
        (lambda m: truncate(shard(m)), "damaged or cut off"),
        (lambda m: shard(m).write_bytes(b""), "damaged or cut off"),
        (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "lists no weights"),
        (lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'), "lists no weights"),
        (lambda m: [p.unlink() for p in m.glob("model*")], "has no weights"),
        (lambda m: [p.unlink() for p in m.glob("model*")] + [torch.save({}, m / "pytorch_model.bin")], "pickled"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(model, tmp_path, damage, complaint):
    damage(model)
    for attempt in (lambda: locate(model), lambda: fetch(ModelParams(source=str(model)), tmp_path / "out")):
        with pytest.raises(ApiqError, match=complaint) as refusal:
            attempt()
        assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["./nowhere/at/all", "/nowhere", "nowhere", "some/where"])
def test_what_is_not_there(source):
    with pytest.raises(ApiqError, match=f"there is no model folder {source}"):
        locate(source)


def test_a_damaged_manifest(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"kind": "local"}))
    with pytest.raises(ApiqError, match="does not say what model"):
        locate(tmp_path)


@pytest.mark.parametrize("content", [{"name": "tiny"}, {"kind": "speech", "layers": []}, [1]])
def test_a_file_of_that_name_which_is_for_something_else(model, content):
    (model / "model.json").write_text(json.dumps(content))
    assert locate(model) == model


def test_where_there_is_one_file_as_well_as_shards_it_is_read_as_transformers_does(model):
    assert len(weight_files(model)) > 1
    (model / "model.safetensors").touch()
    assert weight_files(model) == ["model.safetensors"]


@pytest.fixture
def hub(model, monkeypatch):
    """A hub with one repository, whose branch main is at COMMIT."""
    snapshot = model.rename(model.parent / COMMIT)
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return snapshot, asked


def test_a_hub_model_is_pinned_to_the_commit(hub, tmp_path):
    snapshot, asked = hub
    found = fetch(ModelParams(source="some/model", revision="main"), tmp_path / "out")
    assert (found["kind"], found["repository"], found["revision"], found["commit"]) == (
        "hub",
        "some/model",
        "main",
        COMMIT,
    )
    assert locate(tmp_path / "out") == snapshot
    assert locate("some/model@v1") == snapshot == locate("some/model")
    assert asked == [("some/model", "main"), ("some/model", COMMIT), ("some/model", "v1"), ("some/model", None)]


def test_a_hub_model_of_pickled_weights_is_refused_for_what_it_is(hub, monkeypatch):
    snapshot, _ = hub
    for path in snapshot.glob("*.safetensors*"):
        path.unlink()
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, revision: ["config.json", "a/b.bin"])
    with pytest.raises(ApiqError, match=r"the weights in some/model are pickled \(.bin\)"):
        locate("some/model")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(ApiqError, match="has no weights"):  # the hub is not within reach
        locate("some/model")


def test_of_a_hub_repository_the_model_and_its_terms_are_downloaded_and_no_copies(monkeypatch, model):
    def snapshot_download(name, *, revision, **patterns):
        asked.extend(filter_repo_objects(names, **patterns))
        return str(model)

    names = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model", "LICENSE",
             "Notice.md", "use_policy.txt", "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors",
             "original/model.safetensors", "pytorch_model.bin", "README.md"]  # fmt: skip
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    locate("some/model")
    assert asked == names[:7]


def test_a_hub_model_that_changed_in_the_cache_is_noticed(hub, tmp_path):
    snapshot, _ = hub
    fetch(ModelParams(source="some/model", revision="main"), tmp_path / "out")
    (snapshot / "config.json").write_text((snapshot / "config.json").read_text() + " ")
    with pytest.raises(ApiqError, match=r"config\.json is not the file"):
        locate(tmp_path / "out")


@pytest.mark.parametrize(
    "error, complaint",
    [
        (GatedRepoError, "is gated"),
        (RevisionNotFoundError, "has no revision v9"),
        (RepositoryNotFoundError, "no such repository"),
        (ConnectionError, "can be had from the Hugging Face hub: first"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, complaint):
    def snapshot_download(*args, **kwargs):
        raise error.__new__(error, "first. second") if error is not ConnectionError else error("first. second")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ApiqError, match=complaint):
        locate("some/model@v9")
