"""A command and all its children end with whoever waits for them."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import psutil
import pytest

from apiq.errors import ApiqError
from flows import processes
from flows.processes import stop, stop_all, stream

NESTED = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""


class Interrupted(BaseException):
    """What Prefect raises in a task that is cancelled is no Exception either."""


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_lines_of_both_streams_come_as_they_are_written(tmp_path: Path) -> None:
    script = (
        "import sys, time\nprint('a', flush=True); time.sleep(1)\nprint('b', file=sys.stderr)\nprint()\nsys.exit(3)"
    )
    seen: list[tuple[str, float]] = []
    status = stream([sys.executable, "-c", script], tmp_path, lambda line: seen.append((line, time.monotonic())))
    assert status == 3
    assert [line for line, _ in seen] == ["a", "b"]
    assert seen[1][1] - seen[0][1] > 0.5


def test_the_environment_is_added_to_ours(tmp_path: Path) -> None:
    seen: list[str] = []
    script = "import os; print(os.environ['MINE'], 'PATH' in os.environ)"
    stream([sys.executable, "-c", script], tmp_path, seen.append, {"MINE": "yes"})
    assert seen == ["yes True"]


def test_an_interruption_ends_the_command_and_its_children(tmp_path: Path) -> None:
    pids: list[int] = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        raise Interrupted

    with pytest.raises(Interrupted):
        stream([sys.executable, "-c", NESTED], tmp_path, on_line)
    assert not alive(pids[0])


def test_a_command_has_a_group_of_its_own(tmp_path: Path) -> None:
    seen: list[str] = []
    stream([sys.executable, "-c", "import os; print(os.getpgid(0) == os.getpid())"], tmp_path, seen.append)
    assert seen == ["True"]
    assert os.getpgid(0) != 0


def test_what_does_not_listen_is_killed_after_a_while() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    stop(process, patience=0.5)
    assert process.returncode == -signal.SIGKILL


def test_commands_of_other_threads_end_and_none_begins_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_stopped", threading.Event())
    lines: Queue[str] = Queue()
    with ThreadPoolExecutor(1) as pool:
        running, queued = (pool.submit(stream, [sys.executable, "-c", NESTED], tmp_path, lines.put) for _ in "ab")
        child = int(lines.get(timeout=30))
        stop_all()
        assert running.result(timeout=30) != 0
        with pytest.raises(ApiqError, match="stopped"):
            queued.result(timeout=30)
    assert not alive(child)


def test_an_interrupted_sweep_ends_what_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.sweep import _stopping_at_once

    monkeypatch.setattr(processes, "_stopped", threading.Event())
    lines: Queue[str] = Queue()
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt), _stopping_at_once():
        running = pool.submit(stream, [sys.executable, "-c", NESTED], tmp_path, lines.put)
        child = int(lines.get(timeout=30))
        raise KeyboardInterrupt
    assert running.result(timeout=30) != 0 and not alive(child)


def test_the_temporary_server_does_not_hear_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import server

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    begun = []
    monkeypatch.setattr(server, "get_client", lambda sync_client: begun.append(signal.pthread_sigmask(0, ())))
    server.start()
    assert signal.SIGINT in begun[0]
    assert signal.SIGINT not in signal.pthread_sigmask(0, ())
