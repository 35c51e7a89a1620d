"""What the machine refuses becomes one sentence; a defect keeps its traceback."""

import errno
import subprocess
import sys
import textwrap

import pytest
import torch

from apiq.mishaps import GOES_ON, mishap

FULL = """
import resource, signal, sys
from apiq.mishaps import mishap
import torch
from safetensors.torch import save_file

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
writes = {
    "save": lambda: torch.save(torch.zeros(100_000), "a"),
    "safetensors": lambda: save_file({"a": torch.zeros(100_000)}, "b"),
    "bytes": lambda: open("c", "wb").write(bytes(100_000)),
}
for name, write in writes.items():
    try:
        write()
    except Exception as error:
        print(name, mishap(error))
"""


def test_files_that_outgrow_the_disk(tmp_path):
    """A limit on the size of files stands for a full disk."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL)], cwd=tmp_path, capture_output=True, text=True)
    told = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert told.keys() == {"save", "safetensors", "bytes"}, run.stderr
    assert all(sentence.endswith(GOES_ON) for sentence in told.values())
    assert "as when the disk is full" in told["save"] and "as when the disk is full" in told["safetensors"]
    assert "point APIQ_WORK and the output to a disk" in told["bytes"]


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "lower batch_size of the stage that ran"),
        (MemoryError(), "RAM is full"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), "x.bin'; make room"),
        (ConnectionError("no route"), "no route: what is finished is kept"),
    ],
)
def test_what_was_short_is_named(error, part):
    assert part in mishap(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), ZeroDivisionError()])
def test_a_defect_is_none(error):
    assert mishap(error) is None
