"""A process that is killed, at any moment, costs time and nothing else."""

import multiprocessing
import os
import platform
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from apiq import files
from apiq.errors import ApiqError
from apiq.files import _sweep, new_folder, sha256_folder
from apiq.work import alone
from tests.checkpoint import kills

MODULES = [
    "apiq.quantization",
    "transformers.models.llama.modeling_llama",
    "peft.tuners.lora",
    "tests.checkpoint.kills",
]


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "peft.tuners.lora", kills.__name__])
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join(60)  # what comes after it does not wait for imports
    return context


def test_killed_five_times_the_folder_has_the_same_bytes(original, windows, tmp_path, processes):
    whole, again = tmp_path / "whole", tmp_path / "again"
    begun = time.monotonic()
    process = kills.start(processes, original, windows, whole, tmp_path / "work-1")
    process.join(60)
    seconds = time.monotonic() - begun
    killed = kills.until_done(
        processes, original, windows, again, tmp_path / "work-2", most=5, within=seconds, chance=random.Random(0)
    )
    assert process.exitcode == 0 and killed > 0
    assert sha256_folder(again) == sha256_folder(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "whole", "work-1", "work-2"]
    assert not list((tmp_path / "work-2").iterdir())


def test_two_processes_do_not_do_the_same_work(tmp_path, processes):
    holder = processes.Process(target=kills.hold, args=(tmp_path,))
    holder.start()
    try:
        _wait_for(lambda: (tmp_path / "held").exists())
        with pytest.raises(ApiqError, match="another process is doing this very work"), alone(tmp_path):
            pass
    finally:
        holder.kill()
        holder.join()
    assert holder.exitcode == -signal.SIGKILL
    with alone(tmp_path):  # the lock went with the process
        pass


def test_the_half_written_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, processes):
    writer = processes.Process(target=kills.write_for_ever, args=(tmp_path / "out",))
    writer.start()
    _wait_for(lambda: list(tmp_path.glob(".out.*/half")))
    writer.kill()
    writer.join()
    assert len(list(tmp_path.glob(".out.*"))) == 1
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_killed_while_it_replaces_a_folder_the_old_one_or_the_new_one_is_there(tmp_path, processes, in_one_step):
    if in_one_step and sys.platform != "linux":
        pytest.skip("this system exchanges no folders in one step")
    out, chance = tmp_path / "out", random.Random(0)
    seen = set()
    for _ in range(6):
        before = _written(out / "b")
        writer = processes.Process(target=kills.replace_for_ever, args=(out, in_one_step))
        writer.start()
        _wait_for(lambda before=before: _written(out / "b") not in (None, before))
        time.sleep(chance.uniform(0, 0.1))
        writer.kill()
        writer.join()
        if not in_one_step:
            _sweep(out, f".out.{platform.node()}-")  # as the next run does
        seen.add((out / "a").read_text())
        assert (out / "a").read_text() == (out / "b").read_text()
    assert len(seen) > 1


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    replace = os.replace

    def refuse(source, target):
        if Path(target) == tmp_path / "out" and not Path(source, "old").exists():
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"), new_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_a_symlink_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/real").mkdir()
    (tmp_path / "disk/real/old").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def _written(path):
    """When the file was written; None while it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
