"""What a checkpoint and everything made of it keep of the original, byte for byte."""

import json
import shutil

import pytest

from apiq.checkpoint import manifest
from apiq.exports.merge import merge
from apiq.exports.run import export
from apiq.exports.source import open_source
from apiq.quantization import quantize

from .conftest import settings

GENERATION = '{"eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_p": 0.95}'
TERMS = ("LICENSE", "License.txt", "NOTICE.md", "USE_POLICY.md")


@pytest.fixture
def told(original, tmp_path):
    """The tiny model with settings of generation and terms of its own."""
    folder = tmp_path / "told"
    shutil.copytree(original, folder)
    (folder / "generation_config.json").write_text(GENERATION)
    for name in TERMS:
        (folder / name).write_text(f"the terms in {name}")
    return folder


def test_a_checkpoint_and_its_exports_keep_the_settings_of_generation_and_the_terms(told, windows, tmp_path, work):
    out = tmp_path / "quantized"
    quantize(told, windows, settings(), out)
    export(out, tmp_path / "dense", "dense")
    merge(out, tmp_path / "merged")
    for folder in (out, tmp_path / "dense", tmp_path / "merged"):
        for name in ("generation_config.json", *TERMS):
            assert (folder / name).read_bytes() == (told / name).read_bytes()
    assert open_source(out).folder == out
    assert set(TERMS) <= manifest.verify(out)["files"].keys()


def test_without_a_file_of_its_own_config_json_decides(told, windows, tmp_path, work):
    (told / "generation_config.json").unlink()
    out = tmp_path / "quantized"
    quantize(told, windows, settings(), out)
    config = json.loads((told / "config.json").read_text())
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"]


def test_settings_that_transformers_would_not_save_are_kept(told, windows, tmp_path, work):
    (told / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    quantize(told, windows, settings(), tmp_path / "quantized")
    assert (tmp_path / "quantized/generation_config.json").read_text() == '{"do_sample": false, "temperature": 0.6}'
