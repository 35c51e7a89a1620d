"""The record of a cell, by which it is not run again."""

import json
import math

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
    models = {"full": {"perplexity": {"demo": 8.0}}, "quantized": {"perplexity": {"demo": 8.0 * math.e, "other": 9.0}}}
    (tmp_path / "metrics.json").write_text(json.dumps({**models, "effective_bits": 2.5}))
    (tmp_path / "timing" / "quantize.json").write_text(json.dumps({"seconds": 1.5, "peak_memory_mb": 9}))
    (tmp_path / "timing" / "refine.json").write_text(json.dumps({"seconds": 2.5, "peak_memory_mb": 7}))
    found = measured(tmp_path)
    assert found["full.perplexity.demo"] == 8.0
    assert found["lost.quantized.demo"] == pytest.approx(1.0)
    assert "lost.quantized.other" not in found, "the full-precision model was not measured on it"
    assert found["timing.quantize.seconds"] == 1.5
    assert found["timing.fitting.seconds"] == 4.0
    assert "timing.fitting.peak_memory_mb" not in found, "peaks do not add up"
