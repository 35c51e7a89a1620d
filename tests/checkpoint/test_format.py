"""A reader written from docs/reference/format.md gives the same weights, bit for bit; the same run the same bytes."""

import inspect
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiq.checkpoint import manifest
from apiq.checkpoint.grid_config import described
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.files import sha256_folder
from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat
from apiq.layers.packed import PackedLinear
from apiq.methods.grid import rounded
from apiq.params import QuantizeParams
from apiq.quantization import quantize
from tests.checkpoint import reader

AFFINE = st.builds(
    Grid, st.integers(1, 8), st.integers(0, 70), st.sampled_from([False, True, "balanced"]), st.booleans()
)
TERNARY = st.builds(Grid, st.just(1.58), st.integers(0, 70), st.just(True), st.booleans())
NORMAL = st.builds(NormalFloat, st.integers(2, 4), st.integers(0, 70), double=st.booleans())


def same_bits(ours, theirs):
    return np.array_equal(ours.numpy().view(np.int32), theirs.view(np.int32))


@settings(max_examples=60)
@given(st.one_of(AFFINE, NORMAL, TERNARY), st.integers(1, 40), st.integers(1, 140), st.integers(0, 2**20))
def test_a_reader_of_the_page_gives_the_weights_of_every_grid(grid, rows, columns, seed):
    linear = torch.nn.Linear(columns, rows)
    torch.nn.init.normal_(linear.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    packed = rounded(linear, grid)
    if grid.offsets:
        torch.nn.init.normal_(packed.offsets, std=0.1, generator=torch.Generator().manual_seed(seed))
    tensors = {part: buffer.numpy() for part, buffer in packed.named_buffers()}
    read = reader.dequantized(tensors, described(grid), [rows, columns])
    assert same_bits(packed.dequantized(), read)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "rtn", "bits": 3, "group_size": 43},
        {"method": "gptq", "bits": 4, "symmetric": True},
        {"method": "apiq-bw", "bits": 1, "symmetric": "balanced"},
        {"method": "qlora", "bits": 4},
        {"method": "closed-form", "bits": 1.58, "group_size": 43},
        {"method": "lq-lora", "target_bits": 3.7, "candidate_group_sizes": [16, 32]},
    ],
    ids=lambda values: values["method"],
)
def test_a_reader_of_the_page_gives_the_weights_of_a_folder(make, values):
    """The model has biases and a tied head."""
    folder, _ = make(**values)
    weights = reader.read(folder)
    model = load(folder, device="cpu", adapters=False).model
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert weights.keys() == packed.keys() and len(packed) == 14
    assert len({linear.grid for linear in packed.values()}) > 1 or values["method"] != "lq-lora"
    for name, linear in packed.items():
        assert same_bits(linear.dequantized(), weights[name])


def test_the_reader_is_short_and_stands_alone():
    source = inspect.getsource(reader)
    assert len(source.splitlines()) <= 60
    assert not re.search(r"^\s*(from|import) (apiq|torch|transformers)", source, re.MULTILINE)


def test_two_runs_in_two_folders_write_the_same_bytes(original, windows, tmp_path, monkeypatch):
    written = []
    for place in ("here", "far/away"):
        home = tmp_path / place
        home.mkdir(parents=True)
        shutil.copytree(original, home / "model")
        monkeypatch.setenv("APIQ_WORK", str(home / "work"))
        monkeypatch.chdir(home)
        params = QuantizeParams(bits=2, group_size=32, rank=4, epochs=1)
        quantize(home / "model", windows, params, home / "out")
        written.append(sha256_folder(home / "out"))
    assert written[0] == written[1]
    texts = [path for path in (home / "out").rglob("*") if path.suffix in (".json", ".md", ".csv")]
    assert len(texts) >= 6
    for path in texts:
        assert not re.search(rf"{re.escape(str(tmp_path))}|seconds|\b20\d\d-\d\d-\d\d", path.read_text()), path
    assert json.loads((home / "out/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == ".."


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda facts: {**facts, "format": manifest.FORMAT + 1}, "install a newer apiq"),
        (lambda facts: {"name": "another tool", "files": ["a"]}, "damaged"),
        (lambda facts: [], "damaged"),
        (lambda facts: {**facts, "format": "two"}, "damaged"),
    ],
    ids=["future", "foreign", "list", "version"],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, damage, match):
    manifest.write(tmp_path, "quantized")
    facts = json.loads((tmp_path / manifest.NAME).read_text())
    (tmp_path / manifest.NAME).write_text(json.dumps(damage(facts)))
    with pytest.raises(ApiqError, match=match) as caught:
        manifest.verify(tmp_path)
    assert str(caught.value).count(". ") == 0
