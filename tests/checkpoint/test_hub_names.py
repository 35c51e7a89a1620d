"""A checkpoint that was pushed is loaded by its name on the hub: what no program asked for yet is fetched."""

import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForCausalLM

from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.files import sha256_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache: the folder of the repository me/q at its only commit, still empty."""
    repository = tmp_path / "cache/models--me--q"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def hub(cache, make, monkeypatch):
    """The repository me/q on the hub: the folder that was pushed."""
    pushed, _ = make()

    def snapshot_download(name, *, revision, cache_dir=None, allow_patterns, ignore_patterns=None):
        assert (name, revision or COMMIT) == ("me/q", COMMIT)
        assert cache_dir is None or cache_dir == cache.parents[2]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for file in filter_repo_objects(sha256_folder(pushed), **patterns):
            (cache / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(pushed / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return pushed


def logits(model, windows):
    with torch.no_grad():
        return model(windows).logits


def test_transformers_loads_it_where_it_fetched_the_weights_only(hub, cache, windows):
    for file in hub.glob("*.safetensors*"):
        shutil.copyfile(file, cache / file.name)
    shutil.copyfile(hub / "config.json", cache / "config.json")
    model = AutoModelForCausalLM.from_pretrained("me/q")
    assert torch.equal(logits(model, windows), logits(load(hub, device="cpu", adapters=False).model, windows))
    model = PeftModel.from_pretrained(model, str(cache / "adapter"))
    assert torch.equal(logits(model, windows), logits(load(hub, device="cpu").model, windows))


@pytest.mark.parametrize("name", ["me/q", f"me/q@{COMMIT}"])
def test_load_puts_its_adapters_on(hub, cache, windows, name):
    loaded = load(name, device="cpu")
    assert (loaded.kind, loaded.folder) == ("quantized", cache)
    assert torch.equal(logits(loaded.model, windows), logits(load(hub, device="cpu").model, windows))
    assert not torch.equal(
        logits(loaded.model, windows), logits(load(hub, device="cpu", adapters=False).model, windows)
    )


def test_an_export_has_its_adapters_too(hub, cache, windows):
    import apiq

    dense = shutil.move(hub, hub.with_name("before"))
    apiq.export(dense, hub, "dense")
    loaded = load("me/q", device="cpu")
    assert loaded.kind == "full"
    torch.testing.assert_close(logits(loaded.model, windows), logits(load(dense, device="cpu").model, windows))


def test_offline_a_whole_snapshot_is_enough_and_half_of_one_is_refused(make, cache, windows):
    pushed, _ = make()
    shutil.copytree(pushed, cache, dirs_exist_ok=True)
    assert load("me/q", device="cpu").kind == "quantized"
    AutoModelForCausalLM.from_pretrained("me/q")
    (cache / "losses.csv").unlink()
    with pytest.raises(ApiqError, match=r"losses\.csv is missing"):
        load("me/q", device="cpu")
