"""Refinement lowers the divergence, leaves the codes alone, goes on where it was stopped, refuses a wrong model."""

import csv
import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from apiq.adapters.pooled import is_pooled
from apiq.adapters.pooled import values as pooled_values
from apiq.checkpoint import manifest
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.adapter_file import PACKED
from apiq.checkpoint.loading import load
from apiq.checkpoint.original import find
from apiq.errors import ApiqError
from apiq.meter import Meter
from apiq.params import QuantizeParams, RefineParams
from apiq.quantization import quantize
from apiq.refinement import generation
from apiq.refinement.generation import generated
from apiq.refinement.kept import Kept
from apiq.refinement.run import refine


class Stopped(Exception):
    pass


def settings(**values):
    return RefineParams(**{"epochs": 6, "generated": 1, "prompt": 3, "batch_size": 2, "lr_adapter": 0.01, **values})


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"top_k": 8, "lr_scales": 0.01, "activation_checkpointing": True},
        {"generated": 0, "lr_scales": 0.01},
        {"hidden_weight": 0.0},
        {"adapter_bits": 8},
        {"adapter_bits": 4},
    ],
)
def test_the_divergence_falls_and_what_was_trained_is_what_is_read(make, original, windows, tmp_path, work, values):
    out = tmp_path / "refined"
    found = refine(make(), original, windows, settings(**values), out)
    assert found["loss_last"] < 0.9 * found["loss_first"]
    with torch.no_grad():
        full = load(original).model(input_ids=windows).logits.log_softmax(-1)
        own = load(out).model(input_ids=windows).logits.log_softmax(-1)
    if "top_k" not in values:
        assert float((full.exp() * (full - own)).sum(-1).mean()) == pytest.approx(found["loss_last"], rel=1e-4)
    if "adapter_bits" in values:
        assert (out / "adapter" / PACKED).exists()
        assert effective_bits(out).adapters < 0.3 * effective_bits(make()).adapters
    assert "refined, epochs | 6" in (out / "README.md").read_text()
    assert not list(work.iterdir())
    rows = list(csv.DictReader((out / "refine.csv").open()))
    assert 1 <= len(rows) <= 6
    assert json.loads((out / "metrics.json").read_text())["refine"]["loss_last"] == found["loss_last"]


@pytest.mark.parametrize(
    "values",
    [
        {"method": "rtn"},
        {"adapter": "dora"},
        {"method": "qlora", "bits": 4},
        {"symmetric": True},
        {"bits": 1, "symmetric": "balanced"},
        {"bits": 1.58},
    ],
)
def test_codes_and_zero_points_stay_and_the_rest_is_trained(make, original, windows, tmp_path, work, values):
    folder, out = make(**values), tmp_path / "refined"
    found = refine(folder, original, windows, settings(lr_scales=0.01), out)
    assert found["loss_last"] < found["loss_first"]
    before, after = ({**load_file(each / "block-000.safetensors")} for each in (folder, out))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set() if values.get("method") == "qlora" else {"scales"})
    assert {name: value.dtype for name, value in before.items()} == {name: value.dtype for name, value in after.items()}


@pytest.mark.parametrize("adapter", ["ia3", "boft", "hra", "randlora", "osf", "dora"])
def test_whatever_is_stored_in_few_bits_is_trained_and_measured_so(make, original, windows, tmp_path, work, adapter):
    out = tmp_path / "refined"
    values = {"adapter_bits": 4, "generated": 0, "lr_adapter": 0.005, "epochs": 3}
    found = refine(make(adapter=adapter), original, windows, settings(**values), out)
    with torch.no_grad():
        full = load(original).model(input_ids=windows).logits.log_softmax(-1)
        own = load(out).model(input_ids=windows).logits.log_softmax(-1)
    assert float((full.exp() * (full - own)).sum(-1).mean()) == pytest.approx(found["loss_last"], rel=1e-4)


def test_activations_that_are_made_again_change_nothing_where_the_model_would_drop_some(windows, tmp_path, work):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=61, num_attention_heads=4, max_position_embeddings=32, dropout=0.3, **shape)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    quantize(tmp_path / "opt", windows, QuantizeParams(bits=2, group_size=16, rank=4, epochs=1), tmp_path / "made")
    values = {"epochs": 2, "generated": 0}
    for again in (False, True):
        chosen = settings(activation_checkpointing=again, **values)
        refine(tmp_path / "made", tmp_path / "opt", windows, chosen, tmp_path / str(again))
    one, other = ((tmp_path / name / "refine.csv").read_text() for name in ("False", "True"))
    assert one == other


@pytest.mark.parametrize("values", [{}, {"lr_scales": 0.01, "generated": 0}])
def test_pooled_adapters_stay_pooled(make, original, windows, tmp_path, work, values):
    folder, out = make(pooled=True), tmp_path / "refined"
    found = refine(folder, original, windows, settings(**values), out)
    assert found["loss_last"] < found["loss_first"]
    before, after = (load_file(each / "adapter/adapter_model.safetensors") for each in (folder, out))
    for name, A in after.items():
        assert not torch.equal(A, before[name])
        assert "lora_A" not in name or pooled_values(A, 16) is not None
    assert is_pooled(load(out, device="cpu").model) and not is_pooled(load(make(), device="cpu").model)


def test_stopped_and_taken_up_it_ends_in_the_same_bytes(make, original, windows, tmp_path, work):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    refine(make(), original, windows, settings(), whole)

    def stop(step):
        if step.loss is not None and step.done > 30:
            raise Stopped

    with pytest.raises(Stopped):
        refine(make(), original, windows, settings(), stopped, stop)
    assert not stopped.exists() and len(list(work.iterdir())) == 1
    steps = []
    refine(make(), original, windows, settings(), stopped, steps.append)
    assert min(step.done for step in steps if "window" in step.detail and step.total == 72) > 20
    assert content(stopped) == content(whole)


@pytest.mark.parametrize("last", [2, 4])
def test_stopped_while_it_writes_it_keeps_the_batches_and_ends_in_the_same_bytes(
    make, original, windows, tmp_path, work, monkeypatch, last
):
    monkeypatch.setattr(generation, "_at_once", lambda *_: 2)
    chosen = settings(epochs=1)
    refine(make(), original, windows, chosen, tmp_path / "whole")

    def stop(step):
        if step.detail == f"the quantized model writes window {last}/6":
            raise Stopped

    with pytest.raises(Stopped):
        refine(make(), original, windows, chosen, tmp_path / "stopped", stop)
    assert len(list(work.glob("*/generated-*"))) == last / 2
    monkeypatch.setattr(generation, "_at_once", lambda *_: 8)  # more memory by then
    steps = []
    refine(make(), original, windows, chosen, tmp_path / "stopped", steps.append)
    written = [step.done for step in steps if "writes" in step.detail]
    assert written == list(range(last + 2, 7, 2))
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def stopped_after_a_pass(make, original, windows, out):
    def stop(step):
        if step.loss is not None:
            raise Stopped

    with pytest.raises(Stopped):
        refine(make(), original, windows, settings(epochs=2, generated=0), out, stop)


def test_the_seconds_of_stopped_processes_count(make, original, windows, tmp_path, work):
    stopped_after_a_pass(make, original, windows, tmp_path / "out")
    (path,) = work.glob("*/spent.json")
    spent = json.loads(path.read_text())
    assert spent["cpu_seconds"] > 0 and 0 < spent["seconds"] < 1000
    path.write_text(json.dumps({"seconds": 5000, "cpu_seconds": 7000}))
    found = refine(make(), original, windows, settings(epochs=2, generated=0), tmp_path / "out")
    assert 5000 < found["seconds"] < 6000 and 7000 < found["cpu_seconds"] < 8000


@pytest.mark.parametrize("where, value", [("__version__", "0.0.1"), ("get_num_threads", lambda: 77)])
def test_another_torch_or_number_of_threads_does_not_take_it_up(
    make, original, windows, tmp_path, work, monkeypatch, where, value
):
    stopped_after_a_pass(make, original, windows, tmp_path / "out")
    monkeypatch.setattr(torch, where, value)
    stopped_after_a_pass(make, original, windows, tmp_path / "out")
    assert len(list(work.iterdir())) == 2


def test_stopped_without_ram_it_leaves_no_activations_and_ends_in_the_same_bytes(
    make, original, windows, tmp_path, work, monkeypatch
):
    chosen = settings(generated=0, epochs=1)
    refine(make(), original, windows, chosen, tmp_path / "roomy")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))

    def stop(step):
        if "full-precision model, block 2" in step.detail:
            raise Stopped

    with pytest.raises(Stopped):
        refine(make(), original, windows, chosen, tmp_path / "tight", stop)
    assert [path.name for path in sorted(work.glob("*/*"))] == [".lock"]
    refine(make(), original, windows, chosen, tmp_path / "tight")
    assert not list(work.iterdir())
    assert content(tmp_path / "tight") == content(tmp_path / "roomy")


@pytest.mark.parametrize("start", [0, 1, 5])
def test_hidden_states_of_a_pass_that_was_killed_are_made_anew(make, original, windows, tmp_path, work, start):
    chosen = settings(generated=0, epochs=1, hidden_weight=5.0)
    refine(make(), original, windows, chosen, tmp_path / "whole")

    def stop(step):
        if "full-precision model" in step.detail:
            raise Stopped

    with pytest.raises(Stopped):
        refine(make(), original, windows, chosen, tmp_path / "stopped", stop)
    (folder,) = (path.parent for path in work.glob("*/.lock"))
    Kept(folder, Meter()).keep("hidden", start, torch.ones(1, 16, 32), whole=False)
    assert not (folder / "spent.json").exists(), "its time is lost with it"
    refine(make(), original, windows, chosen, tmp_path / "stopped")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_a_model_without_a_named_head_is_refused_before_anything_is_computed(
    make, original, windows, tmp_path, work, monkeypatch
):
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    steps = []
    with pytest.raises(ApiqError, match=r"LlamaForCausalLM does not name its head.*set refine\.hidden_weight to 0"):
        refine(make(), original, windows, settings(), tmp_path / "out", steps.append)
    assert not steps
    refine(make(), original, windows, settings(hidden_weight=0), tmp_path / "out")


@pytest.mark.parametrize("name", ["descent.pt", "predictions.safetensors", "hidden-*", "generated-*"])
def test_damaged_work_is_refused_with_what_to_do(make, original, windows, tmp_path, work, name):
    def stop(step):
        if step.loss is not None:
            raise Stopped

    with pytest.raises(Stopped):
        refine(make(), original, windows, settings(), tmp_path / "out", stop)
    path = next(work.glob(f"*/{name}"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ApiqError, match="delete it and start again"):
        refine(make(), original, windows, settings(), tmp_path / "out")


def test_another_model_than_the_one_that_was_quantized_is_refused(make, original, windows, tmp_path, work):
    other = tmp_path / "other"
    model = load(original).model
    model.model.norm.weight.data.mul_(1.1)
    model.save_pretrained(other)
    with pytest.raises(ApiqError, match="is not the model that"):
        refine(make(), other, windows, settings(), tmp_path / "out")


def test_the_original_is_found_where_it_was_until_it_is_gone(make, original, monkeypatch, tmp_path):
    folder = make()
    facts = manifest.read(folder)
    assert find(folder, facts) == original
    monkeypatch.setenv("APIQ_CACHE", str(tmp_path))
    with pytest.raises(ApiqError, match="--model"):
        find(folder, facts)


def test_a_recipe_without_refinement_is_told_as_such(make, original, windows, tmp_path, work):
    with pytest.raises(ApiqError, match="as in recipe fast, which has no refinement"):
        refine(make(), original, windows, RefineParams(recipe="fast"), tmp_path / "out")


def test_windows_that_are_too_long_are_refused(make, original, tmp_path, work):
    with pytest.raises(ApiqError, match="context"):
        refine(make(), original, torch.zeros(2, 40, dtype=torch.int64), settings(), tmp_path / "out")


def test_generated_windows_go_on_from_pieces_of_the_given_ones_and_are_the_same_every_time(make, windows):
    model = load(make()).model
    first, second = (generated(model, windows, 5, 3, seed, torch.float32, lambda step: None) for seed in (0, 0))
    assert torch.equal(first, second) and first.shape == (5, 16)
    pieces = {tuple(row[i : i + 3].tolist()) for row in windows for i in range(14)}
    assert all(tuple(row[:3].tolist()) in pieces for row in first)
    assert not torch.equal(first, generated(model, windows, 5, 3, 1, torch.float32, lambda step: None))
    assert len({tuple(row.tolist()) for row in first}) == 5
