"""Two processes that divide the batches of every step train what one process trains."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from apiq import parallel
from apiq.errors import ApiqError
from apiq.finetuning.run import finetune

SCRIPT = """
import json, sys
import torch
from apiq.finetuning.run import finetune
from apiq.params import FinetuneParams
torch.set_num_threads(1)
folder, params, out = json.loads(sys.argv[1])
finetune(folder, FinetuneParams(**params), out)
"""
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--no_python"],
}


def run(quantized, params, out, launcher):
    facts = json.dumps([str(quantized), {**params.model_dump(), "device": "cpu"}, str(out)])
    ended = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], sys.executable, "-c", SCRIPT, facts],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(quantized, params, tmp_path, work, launcher):
    alone, together = tmp_path / "alone", tmp_path / "together"
    finetune(quantized, params, alone)
    run(quantized, params, together, launcher)
    one, two = ([*csv.DictReader((folder / "log.csv").read_text().splitlines())] for folder in (alone, together))
    assert len(one) == len(two) == 13
    for ours, theirs in zip(one, two, strict=True):
        for column in ("loss", "held_out_loss", "learning_rate"):
            assert float(theirs[column] or 0) == pytest.approx(float(ours[column] or 0), rel=1e-4)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (alone, together))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
    counts = [json.loads((folder / "metrics.json").read_text()) for folder in (alone, together)]
    assert counts[0]["tokens"] == counts[1]["tokens"]
    assert not list(work.iterdir())


def test_a_step_that_cannot_be_divided_is_refused(quantized, params, tmp_path, work, monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    monkeypatch.setattr(parallel, "wait", lambda: None)
    with pytest.raises(ApiqError, match=r"finetune\.accumulation is 2; it must be a multiple of 3"):
        finetune(quantized, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()
