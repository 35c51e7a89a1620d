"""The record of a cell, by which it is not run again."""

import json

import pytest

from apiq.errors import ApiqError
from apiq.sweeps.outcome import Outcome, measured, remember, remembered


def test_a_finished_cell_is_remembered_and_a_failed_one_tried_again(tmp_path):
    assert remembered(tmp_path) is None
    done = Outcome("done", None, {"effective_bits": 2.5}, ("errors.csv",))
    remember(tmp_path, done)
    assert remembered(tmp_path) == done
    remember(tmp_path, Outcome("failed", "there is no sun."))
    assert remembered(tmp_path) is None


def test_metrics_and_costs_are_flat(tmp_path):
    (tmp_path / "timing").mkdir()
    with pytest.raises(ApiqError, match=r"there is no file .*metrics\.json"):
        measured(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"full": {"perplexity": {"demo": 8.0}}, "effective_bits": 2.5}))
    (tmp_path / "timing" / "quantize.json").write_text(json.dumps({"seconds": 1.5}))
    assert measured(tmp_path) == {
        "full.perplexity.demo": 8.0, "effective_bits": 2.5, "timing.quantize.seconds": 1.5,
    }  # fmt: skip
