"""Two processes that share the windows of every batch find what one process finds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from apiq import parallel
from apiq.blocks.capture import PADDING
from apiq.checkpoint.reading import linear, linear_names
from apiq.errors import ApiqError

SCRIPT = """
import json, os, sys
import torch
from apiq.params import QuantizeParams
from apiq.quantization import quantize
torch.set_num_threads(1)
facts = json.loads(sys.argv[1])
result = quantize(facts["model"], torch.tensor(facts["windows"]), QuantizeParams(**facts["params"]), facts["out"])
if os.environ.get("RANK", "0") == "0":  # two writers would mix their lines
    print(json.dumps(result["blocks"]))
"""


def run(processes, **facts):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
        command += [sys.executable]
    ended = subprocess.run([*command, "-c", SCRIPT, json.dumps(facts)], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_two_processes_equal_one(original, windows, tmp_path, work, padded):
    if padded:
        windows = windows.clone()
        windows[1, 9:] = PADDING
    params = {"bits": 2, "group_size": 32, "rank": 4, "epochs": 3, "lr_adapter": 0.01, "batch_size": 2}
    facts = {"model": str(original), "windows": windows.tolist(), "params": {**params, "device": "cpu"}}
    alone = run(1, **facts, out=str(tmp_path / "alone"))
    together = run(2, **facts, out=str(tmp_path / "together"))
    for one, two in zip(alone, together, strict=True):
        assert two["loss_first"] == pytest.approx(one["loss_first"], rel=1e-5)
        assert two["loss_last"] == pytest.approx(one["loss_last"], rel=1e-5)
    for name in linear_names(tmp_path / "alone"):
        one, two = (linear(tmp_path / which, name) for which in ("alone", "together"))
        for own, other in ((one.A, two.A), (one.B, two.B)):
            # where a gradient is all but 0, AdamW makes a step of its sign, which the order of a sum can turn
            assert (other - own).norm() <= 1e-4 * own.norm()
    assert not list(Path(work).iterdir())


@pytest.mark.slow
def test_two_processes_equal_one_at_a_mixture_of_experts(tmp_path, work):
    """Each meets experts in an order of its own, and each meets some that the other does not."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_experts=16,
        num_experts_per_tok=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "original")
    windows = torch.randint(0, 61, (4, 4), generator=torch.Generator().manual_seed(0))
    params = {"group_size": 16, "rank": 4, "epochs": 1, "batch_size": 2}
    facts = {"model": str(tmp_path / "original"), "windows": windows.tolist(), "params": {**params, "device": "cpu"}}
    alone = run(1, **facts, out=str(tmp_path / "alone"))
    together = run(2, **facts, out=str(tmp_path / "together"))
    for one, two in zip(alone, together, strict=True):
        assert two["loss_first"] == pytest.approx(one["loss_first"], rel=1e-5)
        assert two["loss_last"] == pytest.approx(one["loss_last"], rel=1e-5)


def test_windows_are_divided_within_every_batch(monkeypatch):
    windows = torch.arange(8).unsqueeze(1)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        rows, part = parallel.share(windows, 4)
        assert part == 2
        shares.append(rows.flatten().tolist())
    assert shares == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("count", "batch", "field"), [(8, 3, "quantize.batch_size"), (6, 4, "calibration.windows")])
def test_what_cannot_be_divided_evenly_is_refused(monkeypatch, count, batch, field):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(ApiqError, match=field):
        parallel.share(torch.zeros(count, 5, dtype=torch.long), batch)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_dividing_the_model_is_refused(monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ApiqError, match=f"accelerate is set to {kind}"):
        parallel.join(torch.device("cpu"))
