"""Closed-form adapters are the optimum for the codes in their place, alone and as a start."""

import copy

import pytest
import torch

from apiq.adapters.closed_form import asymmetric
from apiq.adapters.injection import Adapters
from apiq.adapters.targets import shapes
from apiq.blocks.walk import deploy
from apiq.errors import ApiqError
from apiq.methods import build, starts
from apiq.methods.inputs import inputs
from apiq.params import QuantizeParams


def settings(**values):
    return QuantizeParams(**{"bits": 2, "group_size": 16, "rank": 4, "batch_size": 4, "alpha": 8.0, **values})


def solved(problem, **values):
    case, params = copy.deepcopy(problem), settings(**values)
    solution = build(params).solve(case)
    deploy(case.block, solution, params, torch.float32)
    return solution, case


def error(problem, **values):
    return solved(problem, **values)[1].error(2)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_adapters_solve_the_regression_of_the_deployed_block(problem, name):
    """X is what the linear gets in the full-precision block, Xq what it gets in the deployed one."""
    _, case = solved(problem, method="closed-form", closed_form={"damping": 1e-9})
    X = inputs(problem, problem.X, problem.block.get_submodule(name)).rows.flatten(0, 1).double()
    deployed = case.block.get_submodule(name)
    Xq = inputs(case, case.Xq, deployed).rows.flatten(0, 1).double()
    W, Q = problem.block.get_submodule(name).weight.double(), deployed.base_layer.dequantized().double()
    A, B = asymmetric(W, Q, Xq.t() @ Xq, Xq.t() @ X, 4)
    lora = deployed.lora_B["default"].weight.double() @ deployed.lora_A["default"].weight.double() * 2.0
    lora = lora.detach()
    best, found = (X @ W.t() - Xq @ (Q + product).t() for product in (B @ A.t(), lora))
    assert float(found.norm()) == pytest.approx(float(best.norm()), rel=1e-4)


def test_the_nearer_the_objective_to_the_output_the_less_is_lost(problem):
    errors = {
        objective: error(problem, method="closed-form", closed_form={"objective": objective})
        for objective in ("plain", "whitened", "asymmetric")
    }
    assert errors["asymmetric"] < errors["whitened"] < errors["plain"]
    assert errors["plain"] < error(problem, method="gptq")


def test_plain_on_rounded_codes_is_one_step_of_loftq(problem):
    one, _ = solved(problem, method="closed-form", closed_form={"objective": "plain", "codes": "rtn"})
    other, _ = solved(problem, method="loftq", loftq={"steps": 1, "levels": "uniform"})
    for name, value in one.adapters.items():
        torch.testing.assert_close(value, other.adapters[name])


def test_searched_codes_lose_less_than_rounded_ones(problem):
    errors = {
        codes: error(problem, method="closed-form", closed_form={"codes": codes}) for codes in ("rtn", "searched")
    }
    assert errors["searched"] < errors["rtn"]


@pytest.mark.parametrize("method", ["apiq-bw", "apiq-lw"])
def test_as_a_start_it_is_better_than_zero(problem, method):
    starts_at = {start: error(problem, method=method, start=start, epochs=0) for start in ("default", "closed-form")}
    assert starts_at["closed-form"] < 0.7 * starts_at["default"]


def test_the_start_of_apiq_is_the_closed_form_for_its_codes(problem, monkeypatch):
    asked = []
    best = starts.best
    monkeypatch.setattr(starts, "best", lambda W, Q, *rest, **how: asked.append((W, Q)) or best(W, Q, *rest, **how))
    solution, _ = solved(problem, method="apiq-bw", start="closed-form", epochs=0)
    assert len(asked) == len(solution.linears) == 7
    for name, (W, Q) in zip(problem.linears(), asked, strict=True):
        assert torch.equal(W, problem.block.get_submodule(name).weight)
        assert torch.equal(Q, solution.linears[name].dequantized())


def test_a_start_looks_at_as_many_windows_as_the_widest_linear_needs(problem, monkeypatch):
    looked_at = []
    run = problem.run
    monkeypatch.setattr(
        problem, "run", lambda rows, batch, **how: looked_at.append(batch.stop) or run(rows, batch, **how)
    )
    for tokens, windows in ((1, 4), (2, 6)):  # 48 inputs, windows of 12 tokens, of which there are 6
        looked_at.clear()
        monkeypatch.setattr(starts, "TOKENS", tokens)
        originals, params = problem.linears(), settings(start="closed-form", rank=2)
        adapters = Adapters(copy.deepcopy(problem.block), params, shapes(originals), 0, start=True)
        starts.start_at_closed_form(problem, adapters, originals, originals, params)
        assert max(looked_at) == windows


def test_inputs_that_cannot_be_inverted_are_refused_with_what_to_change(problem, monkeypatch):
    monkeypatch.setattr("apiq.methods.closed_form.damped", lambda G, share: -G)
    with pytest.raises(ApiqError, match=r"linear self_attn\.q_proj in block 1 .* raise quantize\.closed_form\.damping"):
        build(settings(method="closed-form")).solve(problem)


@pytest.mark.parametrize("method", ["closed-form", "loftq", "qlora", "gptq-lora"])
def test_only_the_chosen_linears_carry_adapters(problem, method):
    solution, _ = solved(problem, method=method, adapter_targets=["q_proj", "down_proj"])
    assert len(solution.linears) == 7
    carriers = {name.rpartition(".lora_")[0] for name in solution.adapters}
    assert carriers == {"self_attn.q_proj", "mlp.down_proj"}


@pytest.mark.parametrize("method", ["qlora", "gptq-lora"])
@pytest.mark.parametrize("adapter", ["none", "dora", "ia3"])
def test_adapters_at_their_start_change_nothing_whatever_they_are(problem, method, adapter):
    solution, case = solved(problem, method=method, adapter=adapter)
    assert bool(solution.adapters) == (adapter != "none")
    bare, plain = solved(problem, method=method, adapter="none")
    assert not bare.adapters
    assert case.error(2) == pytest.approx(plain.error(2), rel=1e-4)
