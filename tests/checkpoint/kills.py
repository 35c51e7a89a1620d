"""Quantization in a process of its own, and the killing of it."""

import itertools
import os
import signal
import time

import torch

from apiq import files
from apiq.files import new_folder
from apiq.params import QuantizeParams
from apiq.quantization import quantize
from apiq.work import alone


def settings():
    return QuantizeParams(bits=2, group_size=32, rank=4, epochs=3, lr_adapter=0.01, device="cpu")


def run(model, windows, out, work):
    torch.set_num_threads(1)
    os.environ["APIQ_WORK"] = str(work)
    quantize(model, torch.tensor(windows), settings(), out)


def start(processes, model, windows, out, work):
    process = processes.Process(target=run, args=(model, windows.tolist(), out, work))
    process.start()
    return process


def until_done(processes, model, windows, out, work, most, within, chance):
    """Quantize, killing the process after a random share of `within` seconds `most` times at most; how often it was.

    The earliest kill is the first: `within` may be the time of a slower run, and what is taken up again is shorter.
    """
    for done, share in enumerate(sorted(chance.uniform(0.1, 0.9) for _ in range(most))):
        process = start(processes, model, windows, out, work)
        process.join(share * within)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return done
        assert process.exitcode == -signal.SIGKILL
    process = start(processes, model, windows, out, work)
    process.join(60)
    assert process.exitcode == 0
    return most


def hold(folder):
    """Hold the work in `folder` until killed."""
    with alone(folder):
        (folder / "held").touch()
        time.sleep(600)


def write_for_ever(out):
    """Begin to write the folder `out` and never end."""
    with new_folder(out) as folder:
        (folder / "half").touch()
        time.sleep(600)


def replace_for_ever(out, in_one_step):
    """Write the folder `out` again and again, two files of one number each time."""
    if not in_one_step:
        files.exchange = lambda one, other: False
    for number in itertools.count():
        with new_folder(out) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(str(number))
