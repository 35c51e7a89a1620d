import pytest
import torch
from pyarrow import parquet

from apiq.calibration import store
from apiq.errors import ApiqError
from apiq.files import read_json, sha256

WINDOWS = torch.randint(0, 40_000, (7, 33), generator=torch.Generator().manual_seed(1))


def test_what_is_written_is_read(tmp_path):
    store.write(tmp_path / "c", WINDOWS, {"corpus": "demo"})
    assert torch.equal(store.read(tmp_path / "c"), WINDOWS)


def test_one_row_a_window_of_int32(tmp_path):
    store.write(tmp_path / "c", WINDOWS, {})
    table = parquet.read_table(tmp_path / "c" / "windows.parquet")
    assert table.schema.field("input_ids").type.value_type.bit_width == 32
    assert table["input_ids"].to_pylist() == WINDOWS.tolist()


def test_the_manifest_says_where_from_and_what(tmp_path):
    store.write(tmp_path / "c", WINDOWS, {"corpus": "demo"})
    manifest = read_json(tmp_path / "c" / "manifest.json")
    digest = sha256(tmp_path / "c" / "windows.parquet")
    assert manifest == {"corpus": "demo", "windows": 7, "length": 33, "files": {"windows.parquet": digest}}


def test_the_same_windows_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        store.write(tmp_path / name, WINDOWS, {"corpus": "demo"})
    for file in ("windows.parquet", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_writing_replaces(tmp_path):
    store.write(tmp_path / "c", WINDOWS, {})
    store.write(tmp_path / "c", WINDOWS[:2], {})
    assert torch.equal(store.read(tmp_path / "c"), WINDOWS[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda c: flip(c / "windows.parquet"), "is damaged"),
        (lambda c: (c / "windows.parquet").write_bytes((c / "windows.parquet").read_bytes()[:-9]), "is damaged"),
        (lambda c: (c / "windows.parquet").unlink(), "no calibration windows"),
        (lambda c: (c / "manifest.json").unlink(), "no file"),
        (lambda c: (c / "manifest.json").write_text("{}"), "is damaged"),
    ],
)
def test_damage_is_refused(tmp_path, damage, complaint):
    store.write(tmp_path / "c", WINDOWS, {})
    damage(tmp_path / "c")
    with pytest.raises(ApiqError, match=complaint):
        store.read(tmp_path / "c")
