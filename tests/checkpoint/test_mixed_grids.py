"""A grid for each linear: bits go where they are worth most, and every reader finds the grid of each linear."""

import pytest
import torch

from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.loading import load
from apiq.checkpoint.reading import linear, linear_names
from apiq.errors import ApiqError
from apiq.files import read_json
from apiq.methods.lq_lora import LqLora, candidate_grids
from apiq.params import QuantizeParams


def model_bits(folder):
    counted = effective_bits(folder)
    return counted.codes + counted.scales + counted.zeros


@pytest.mark.parametrize("levels", ["normal-float", "uniform"])
@pytest.mark.parametrize("weights", ["none", "fisher"])
def test_a_target_of_bits_is_met_and_read_back(make, levels, weights):
    wanted = {"target_bits": 3.7, "candidate_group_sizes": [16, 32], "levels": levels, "weights": weights}
    folder, result = make(method="lq-lora", lq_lora=wanted)
    assert 3.7 - 0.2 < model_bits(folder) <= 3.7  # 14 linears: it cannot be met as nearly as in a large model
    assert result["effective_bits"] == effective_bits(folder).total
    config = read_json(folder / "config.json")["quantization_config"]
    assert len({tuple(entries.items()) for entries in config["exceptions"].values()}) > 1
    loaded = load(folder, device="cpu").model
    choices = candidate_grids(QuantizeParams(method="lq-lora", lq_lora=wanted))
    for name in linear_names(folder):
        module = loaded.get_submodule(f"base_model.model.{name}").base_layer
        stored = linear(folder, name)
        assert module.grid == stored.grid and stored.grid in choices
        torch.testing.assert_close(module.dequantized(), stored.Q)
        assert int(stored.codes.max()) < 2**stored.grid.bits


def test_a_finished_survey_is_not_made_again(make, monkeypatch):
    wanted = {"target_bits": 3.0, "weights": "fisher"}
    whole_run, _ = make("whole", method="lq-lora", lq_lora=wanted)
    solve, surveys = LqLora.solve, []
    survey = LqLora.survey
    monkeypatch.setattr(LqLora, "survey", lambda self, whole: surveys.append(1) or survey(self, whole))

    def killed(self, problem):
        raise KeyboardInterrupt

    monkeypatch.setattr(LqLora, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        make(method="lq-lora", lq_lora=wanted)
    monkeypatch.setattr(LqLora, "solve", solve)
    folder, _ = make(method="lq-lora", lq_lora=wanted)
    assert len(surveys) == 1
    for path in whole_run.rglob("*.safetensors"):
        assert path.read_bytes() == (folder / path.relative_to(whole_run)).read_bytes()


def test_a_target_below_the_smallest_grid_is_refused(make):
    with pytest.raises(ApiqError, match=r"target_bits is 1\.5, but the smallest candidates take [\d.]+ bits a weight"):
        make(method="lq-lora", lq_lora={"target_bits": 1.5})
