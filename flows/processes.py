"""Commands in a process group of their own: their lines as they come, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from apiq.errors import ApiqError

PATIENCE = 10.0
"""Seconds that a stopped command has to end by itself. Prefect gives a cancelled flow 30 in all."""
_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


def stream(
    command: Sequence[str], cwd: Path, on_line: Callable[[str], None], environment: Mapping[str, str] | None = None
) -> int:
    """Run a command, hand over each line of stdout and stderr, and return its exit status.

    Whatever interrupts the wait (a cancelled flow, Ctrl-C, an error in `on_line`) ends the command
    and all its children before it goes on.

    Raises:
        ApiqError: `stop_all` was called.
    """
    if _stopped.is_set():
        raise ApiqError("stopped before it began.")
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    _running.add(process)
    try:
        with process.stdout:
            for line in process.stdout:
                if line.strip():
                    on_line(line.rstrip())
        return process.wait()
    except BaseException:
        stop(process)
        raise
    finally:
        _running.discard(process)


def stop_all() -> None:
    """End the commands that other threads of this process run, and let none begin any more: the process is to end."""
    _stopped.set()
    for process in tuple(_running):
        stop(process)


def stop(process: subprocess.Popen[str], patience: float = PATIENCE) -> None:
    """End a process that leads a group, and the group: first so that it can tidy up, then by force.

    DVC ignores an interrupt while a stage runs and releases its locks when the stage ends. So the
    stage is terminated, DVC interrupted, and only what is left after `patience` seconds is killed.
    """
    process.send_signal(signal.SIGINT)
    deadline, told = time.monotonic() + patience, set[int]()
    while time.monotonic() < deadline and (process.poll() is None or _members(process.pid)):
        told |= _terminate_rest(process, but=told)  # again and again: DVC may be about to start the stage
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _terminate_rest(process: subprocess.Popen[str], but: set[int]) -> set[int]:
    """Send SIGTERM to the descendants of a process, and to what is left of its group once it has ended itself.

    Those of `but` are left out; returned is whom it was sent to.
    """
    if process.poll() is not None:
        rest = _members(process.pid)
    else:
        rest = []
        with contextlib.suppress(psutil.NoSuchProcess):
            rest = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    told = set(rest) - but
    for pid in told:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return told


def _members(group: int) -> list[int]:
    """The living processes of a group."""
    members = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members
