"""A repository root as the current directory, and sweep files in it."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = """
title: Small
source: Table 0
base: {refine.epochs: 0, finetune.task: none, evaluate.tasks: []}
grid:
  quantize.bits: [3, 2]
  method:
    rtn: {quantize.method: rtn}
    bw: {quantize.method: apiq-bw, quantize.rank: 4}
table:
  rows: [method]
  columns: quantize.bits
  metrics: {perplexity: quantized.perplexity.*}
paper:
  columns: [Llama]
  rows: [[2, rtn, 431.97], [2, bw, 7.59]]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """params.yaml and the profiles, as the current directory."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "params", tmp_path / "params")
    os.makedirs(tmp_path / "data" / "tasks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(place):
    """Write a sweep file; its path."""

    def write(text=SMALL, name="small.yaml"):
        (place / name).write_text(text)
        return Path(name)

    return write
