"""A sweep that is killed goes on, and its cells give the bytes of the same cells alone: real stages, a tiny model."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.errors import ApiqError
from apiq.overrides import assign, read_yaml
from apiq.params import parse
from apiq.progress import silent
from apiq.sweeps.cells import Cell, Local, plan
from ci.regression import copy_tree
from flows.cells import bench, fetch_experiments, run_cell
from flows.workspace import call, dvc
from stages import calibration, model, quantize

WORDS = 61
SWEEP = """
title: Three methods
base:
  quantize.recipe: paper
  refine.recipe: paper
  finetune.task: none
  evaluate.perplexity: {text: {text: demo, windows: 2, length: 16}}
  evaluate.rtn: false
  evaluate.errors: false
  evaluate.tasks: []
  calibration.windows: 4
  calibration.length: 16
  quantize.group_size: 16
grid:
  method:
    apiq: {quantize.method: apiq-bw, quantize.rank: 4, quantize.epochs: 10}
    gptq: {quantize.method: gptq}
    failing: {quantize.method: gptq, model.source: weightless}
table: {rows: [method], metrics: {perplexity: quantized.perplexity.*}}
"""
DRIVER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from apiq.sweeps.cells import Local, plan
from flows.cells import bench, run_cell
planned = plan("three.yaml", local=Local(*sys.argv[1:]))
with bench(Path.cwd(), planned.name, None, [], threads=1) as on, ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda cell: run_cell(cell, on, print), planned.cells))
"""


@pytest.fixture
def local(tmp_path: Path) -> Local:
    """A model of two blocks and texts for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("train.txt", "test.txt")):
        dice = random.Random(seed)
        (tmp_path / name).write_text(" ".join(f"w{dice.randrange(3, WORDS)}" for _ in range(400)))
    return Local(*(str(tmp_path / name) for name in ("model", "train.txt", "test.txt")))


def alone(cell: Cell, folder: Path) -> dict[str, str]:
    """MD5 of the quantized tensors when the stages run in this process, one after another."""
    values = read_yaml("params.yaml")
    assign(values, cell.settings)
    for stage in (model, calibration, quantize):
        stage.main(parse(values), silent)
    quantized = folder / "data" / "quantized"
    files = {path.relative_to(quantized).as_posix(): path for path in quantized.rglob("*.safetensors")}
    return {name: hashlib.md5(path.read_bytes()).hexdigest() for name, path in files.items()}


def saved(cell: Cell, root: Path) -> dict[str, str]:
    """MD5 of the quantized tensors in the experiment of a cell, as DVC has recorded them."""
    reference = next(line for line in call(["git", "show-ref"], root).splitlines() if line.endswith(f"/{cell.name}"))
    lock = YAML(typ="safe").load(call(["git", "show", f"{reference.split()[0]}:dvc.lock"], root))
    digest = next(out["md5"] for out in lock["stages"]["quantize"]["outs"] if out["path"] == "data/quantized")
    listing = json.loads((root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]).read_text())
    return {each["relpath"]: each["md5"] for each in listing if each["relpath"].endswith(".safetensors")}


def test_experiments_of_others_stay_though_git_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[fetch]\nprune = true\n[user]\nname = Somebody\nemail = some@body\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    root, place = tmp_path / "root", tmp_path / "place"
    call(["git", "init", "--quiet", str(root)], tmp_path)
    call(["git", "commit", "--quiet", "--allow-empty", "--message", "begin"], root)
    call(["git", "clone", "--quiet", str(root), str(place)], tmp_path)
    for repository, name in ((root, "mine"), (place, "cell")):
        call(["git", "update-ref", f"refs/exps/12/34/{name}", "HEAD"], repository)
    fetch_experiments(place, root)
    found = call(["git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps"], root).split()
    assert found == ["cell", "mine"]


def run_and_kill(local: Local, finished: Path) -> None:
    """Run the sweep, two cells at a time, and kill it when the record of a cell is there."""
    command = [sys.executable, "-c", DRIVER, str(local.model), str(local.calibration), str(local.text)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not finished.exists() and driver.poll() is None:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_cells_are_the_same_cells_alone(
    local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "repository"
    copy_tree(root)
    (root / "three.yaml").write_text(SWEEP)
    (root / "weightless").mkdir()
    shutil.copy(Path(str(local.model)) / "config.json", root / "weightless")
    monkeypatch.chdir(root)
    monkeypatch.delenv("APIQ_WORK", raising=False)
    planned = plan("three.yaml", local=local)
    apiq, gptq, _ = planned.cells
    folder = root / "data" / "sweeps" / planned.name / "cells"
    record = folder / gptq.name / "cell.json"
    run_and_kill(local, record)
    finished = record.stat().st_mtime_ns
    assert os.listdir(root / ".prefect" / "sweeps" / "cells")  # the clones that it was at work in

    with bench(root, planned.name, None, [], threads=1) as on:
        outcomes = [run_cell(cell, on, print) for cell in planned.cells]
        with pytest.raises(ApiqError, match="another process runs the sweep"), bench(root, planned.name, None, [], 1):
            pass
    assert [outcome.status for outcome in outcomes] == ["done", "done", "failed"]
    assert str(outcomes[2].error).startswith("the stage model failed: the model in ")
    assert "weightless has no weights" in str(outcomes[2].error)
    assert all(outcome.metrics["quantized.perplexity.text"] > 1 for outcome in outcomes[:2])
    assert record.stat().st_mtime_ns == finished
    assert os.listdir(root / ".prefect" / "sweeps" / "cells") == []
    assert set(call(dvc("exp", "list", "--name-only"), root).split()) == {apiq.name, gptq.name}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell, files in ((apiq, 4), (gptq, 3)):
            found = alone(cell, root)
            assert len(found) == files
            assert found == saved(cell, root)
    finally:
        torch.set_num_threads(threads)
