"""The folder that says that nothing was finetuned."""

import pytest

from apiq.checkpoint import manifest, skipped
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.reporting.gather import Folders, gather


def test_it_says_so_and_is_no_model(tmp_path):
    (tmp_path / "quantized").mkdir()
    skipped.write(tmp_path / "quantized", tmp_path / "finetuned")
    assert skipped.is_skipped(tmp_path / "finetuned")
    assert not skipped.is_skipped(tmp_path / "quantized")
    with pytest.raises(ApiqError, match=r"holds no model: finetune\.task was none; load the quantized folder"):
        load(tmp_path / "finetuned")
    assert gather(Folders.below(tmp_path)).absent["finetuned"] == "Nothing was finetuned: finetune.task is none."


def test_below_a_symlink_it_names_the_base_that_is_there(tmp_path):
    (tmp_path / "disk/deep/quantized").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk/deep")
    skipped.write(tmp_path / "disk/deep/quantized", tmp_path / "data/finetuned")
    assert manifest.read(tmp_path / "data/finetuned")["base"] == "../quantized"
