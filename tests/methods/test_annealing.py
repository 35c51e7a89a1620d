"""Soft rounding is annealed over the steps, and what is deployed is rounded to nearest."""

import copy

import pytest
import torch

from apiq.blocks.walk import deploy
from apiq.methods import annealing, build
from apiq.methods.annealing import COLD, HARD, HOT, annealed, temperature
from apiq.methods.fitting import Fit
from apiq.params import QuantizeParams

FITTED = ["apiq-bw", "apiq-lw", "omniquant"]


def settings(**values):
    values = {"bits": 2, "group_size": 16, "rank": 4, "epochs": 10, "batch_size": 2, "rounding": "soft", **values}
    values["recipe"] = "paper"
    return QuantizeParams(**values)


def test_the_temperature_falls_to_zero():
    falling = [temperature(step / 100) for step in range(101)]
    assert falling[0] == HOT
    assert falling == sorted(falling, reverse=True)
    soft = [value for value in falling if value]
    assert min(soft) == pytest.approx(COLD, rel=0.1)
    assert len(soft) == pytest.approx(100 * (1 - HARD), abs=1)


def test_linears_are_left_hard_whatever_happens(problem):
    fit = Fit(problem, settings())
    with pytest.raises(RuntimeError, match="on purpose"), annealed(fit.fakes.values(), fit.params) as anneal:
        assert anneal is not None
        anneal(0.5)
        assert {fake.temperature for fake in fit.fakes.values()} == {temperature(0.5)}
        raise RuntimeError("on purpose")
    assert {fake.temperature for fake in fit.fakes.values()} == {0.0}
    with annealed(fit.fakes.values(), settings(rounding="straight-through")) as anneal:
        assert anneal is None


@pytest.mark.parametrize("method", FITTED)
def test_each_step_is_told_its_share_and_what_was_trained_is_deployed(problem, monkeypatch, method):
    seen = []
    monkeypatch.setattr(annealing, "temperature", lambda done: seen.append(done) or temperature(done))
    params = settings(method=method, epochs=3, held_out=0.34)
    case = copy.deepcopy(problem)
    solution = build(params).solve(case)
    trained = case.error(2)
    deploy(case.block, solution, params, torch.float32)
    if method != "omniquant":  # which leaves the block as it was before rounding
        assert case.error(2) == pytest.approx(trained, rel=1e-4)
    assert min(seen) == 0 and max(seen) == 1.0  # 1: hard, for the windows set aside
    assert len({done for done in seen if done < 1}) == 3 * 2  # four windows are left to train on, two a step


@pytest.mark.parametrize("method", FITTED)
def test_soft_steps_lower_the_loss_of_the_deployed_block(problem, method):
    errors = []
    for epochs in (0, 8):
        params = settings(method=method, epochs=epochs, lr_theta=0.02, lr_adapter=0.01)
        case = copy.deepcopy(problem)
        deploy(case.block, build(params).solve(case), params, torch.float32)
        errors.append(case.error(2))
    assert errors[1] < 0.9 * errors[0]
