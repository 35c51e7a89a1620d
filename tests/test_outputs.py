"""Nothing of others is replaced, and what cannot be written is known before the work."""

import pytest

from apiq.checkpoint import manifest
from apiq.errors import ApiqError
from apiq.outputs import require_place


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "adapter").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"1")
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"2")
    manifest.write(folder, "quantized")
    (folder / "README.md").write_text("card")
    return folder


def test_new_empty_and_own_folders_will_do(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (checkpoint, tmp_path / "empty", tmp_path / "new", tmp_path / "deep/er/new"):
        require_place(out, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "empty"]


def test_files_of_others_stay(checkpoint, tmp_path):
    (checkpoint / "notes.txt").write_text("mine")
    with pytest.raises(ApiqError, match=r"did not write there \(notes.txt\); give another folder"):
        require_place(checkpoint)
    model = tmp_path / "model"
    model.mkdir()
    for name in "abcd":
        (model / name).touch()
    with pytest.raises(ApiqError, match=r"\(a, b, c, \.\.\.\)"):
        require_place(model)


def test_a_report_is_replaced_by_a_report(tmp_path):
    (tmp_path / "report/figures").mkdir(parents=True)
    with pytest.raises(ApiqError, match="did not write there"):
        require_place(tmp_path / "report", mark="report.html")
    (tmp_path / "report/report.html").touch()
    require_place(tmp_path / "report", mark="report.html")


def test_a_checkpoint_is_not_replaced_by_a_report(checkpoint):
    for names in ((), ("report.html",)):
        for name in names:
            (checkpoint / name).touch()
        with pytest.raises(ApiqError, match=r"an earlier run of this command did not write there \(README.md, adapter"):
            require_place(checkpoint, mark="report.html")


def test_what_is_read_stays(checkpoint, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    for out in (checkpoint, link, tmp_path):
        with pytest.raises(ApiqError, match="which is read here"):
            require_place(out, checkpoint)
    with pytest.raises(ApiqError, match="did not write there"):
        require_place(checkpoint / "adapter", checkpoint)


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ApiqError, match="is a file"):
        require_place(file)
    with pytest.raises(ApiqError, match="nothing can be written to"):
        require_place(file / "below")
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for out in (".", tmp_path):
        with pytest.raises(ApiqError, match="give a folder below it"):
            require_place(out)
    with pytest.raises(ApiqError, match="nothing can be written to /proc"):
        require_place("/proc/nothing")
