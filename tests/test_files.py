"""Hashes of large files are taken once, and anew when the file is written to."""

import hashlib
import os

from apiq import files


def test_a_large_file_is_hashed_once_until_it_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 100)
    hashed, original = [], files._hashed
    monkeypatch.setattr(files, "_hashed", lambda path: hashed.append(path) or original(path))
    path = tmp_path / "weights"
    for content in (b"a" * 200, b"b" * 200):
        path.write_bytes(content)
        os.utime(path, ns=(0, content[0]))  # two writes within a tick of the clock would look alike
        for _ in range(3):
            assert files.sha256(path) == hashlib.sha256(content).hexdigest()
    assert len(hashed) == 2
    path.write_bytes(b"c" * 50)
    assert [files.sha256(path) for _ in range(2)] == [hashlib.sha256(b"c" * 50).hexdigest()] * 2
    assert len(hashed) == 4
