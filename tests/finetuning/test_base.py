"""Adapters belong to the weights that they were trained on."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from apiq.checkpoint import manifest
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.exports.source import open_source
from apiq.finetuning.run import finetune

# peft 0.21 itself asks transformers for this
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def moved(quantized, params, tmp_path):
    """A finetuned folder and its base."""
    base, out = shutil.copytree(quantized, tmp_path / "quantized"), tmp_path / "finetuned"
    finetune(base, params.model_copy(update={"epochs": 0.1, "checkpoints": 1}), out)
    assert load(out).folder == base
    return out, base


def rewritten(base):
    """The base made again with other weights, as `apiq quantize --out` does."""
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    manifest.write(base, "quantized")


@pytest.mark.parametrize("read", [load, open_source])
def test_adapters_are_refused_on_another_base_than_theirs(moved, read):
    out, base = moved
    rewritten(base)
    with pytest.raises(ApiqError, match=r"finetuned on other weights than those in .*; put the base back"):
        read(out)


def test_a_base_with_another_card_and_metrics_is_still_theirs(moved):
    out, base = moved
    (base / "metrics.json").write_text("{}")
    manifest.write(base, "quantized", method="loftq")
    assert load(out).folder == base


def test_a_folder_that_says_nothing_of_the_weights_of_its_base_is_read(moved):
    out, base = moved
    facts = manifest.read(out)
    del facts["base_weights"]
    (out / "apiq.json").write_text(json.dumps(facts))
    rewritten(base)
    assert load(out).folder == base
