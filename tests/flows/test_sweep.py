"""The sweep as Prefect runs it, on a scratch repository whose stages only pretend."""

import json
from pathlib import Path

import pytest

from apiq.sweeps.cells import plan
from apiq.sweeps.outcome import Outcome, remember

pytestmark = pytest.mark.slow

SWEEP = """
title: Three cells
grid: {quantize.bits: [3, 4, 5]}
refused: {there is no such grid: {quantize.bits: 5}}
table: {rows: [quantize.bits], metrics: {perplexity: perplexity}}
figure: {kind: bar, x: quantize.bits, y: perplexity}
"""


def test_finished_failed_and_refused_cells_stand_in_one_table(
    repository: Path, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.sweep import sweep

    monkeypatch.setattr("flows.sweep.ROOT", repository)
    (repository / "three.yaml").write_text(SWEEP)
    (repository / "break-model").touch()
    folder = repository / "data" / "sweeps" / "three"
    remember(folder / "cells" / plan("three.yaml").cells[0].name, Outcome("done", None, {"perplexity": 7.0}))

    state = sweep("three.yaml", jobs=2, return_state=True)

    assert state.is_failed()
    sentence = "the stage model failed: the stand-in was told to fail."
    assert str(state.message).startswith("1 of 3 cells failed, three-4-")
    assert sentence in str(state.message)
    cells = json.loads((folder / "cells.json").read_text())["cells"]
    assert [(cell["status"], cell["error"]) for cell in cells] == [
        ("done", None),
        ("failed", sentence),
        ("refused", "there is no such grid"),
    ]
    assert "| 3 | 7.000 |" in (folder / "table.md").read_text()
    assert (folder / "figure.svg").exists()

    wrong = sweep("gone.yaml", return_state=True)
    assert wrong.is_failed()
    assert wrong.message == "there is no file gone.yaml."
