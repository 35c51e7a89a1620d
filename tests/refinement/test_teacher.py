"""What streams through the blocks predicts what the whole model does."""

from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from apiq.checkpoint.loading import full_precision
from apiq.errors import ApiqError
from apiq.meter import Meter
from apiq.refinement import teacher
from apiq.refinement.divergence import top
from apiq.refinement.kept import Kept
from apiq.refinement.teacher import predictions

CPU = torch.device("cpu")


@pytest.mark.parametrize("k", [5, 61])
def test_predictions_are_those_of_the_whole_model(original, windows, k, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    with torch.no_grad():
        logs, index = top(model(input_ids=windows, use_cache=False).logits, k)
    steps = []
    found = predictions(full_precision(original).stream, windows, k, CPU, torch.float32, tmp_path, steps.append)
    torch.testing.assert_close(found.logs, logs)
    assert (found.index is None) == (k == 61)
    if index is not None:
        assert torch.equal(found.index, index)
    assert [step.done for step in steps] == [1, 2]


def test_without_ram_the_activations_live_in_files_and_nothing_else_changes(original, windows, tmp_path, monkeypatch):
    homes, choose = [], teacher.choose_home
    monkeypatch.setattr(teacher, "choose_home", lambda *given: homes.append(choose(*given)) or homes[-1])
    stream = full_precision(original).stream

    def seen(step):
        assert not list(tmp_path.iterdir())

    roomy = predictions(stream, windows, 5, CPU, torch.float32, tmp_path, seen)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    tight = predictions(stream, windows, 5, CPU, torch.float32, tmp_path, seen)
    assert [home.kind for home in homes] == ["device", "disk"]
    assert homes[-1].folder == tmp_path
    assert torch.equal(roomy.logs, tight.logs) and torch.equal(roomy.index, tight.index)


@pytest.mark.parametrize("tokens", [1, 5, 16, 40])
def test_few_logits_at_a_time_give_the_same_predictions(original, windows, tmp_path, monkeypatch, tokens):
    stream, asked = full_precision(original).stream, []
    whole = predictions(stream, windows, 5, CPU, torch.float32, tmp_path, lambda step: None)
    monkeypatch.setattr(teacher, "LOGITS", tokens * 61 * 4)
    monkeypatch.setattr(teacher, "top", lambda logits, k: asked.append(logits.shape[:2].numel()) or top(logits, k))
    found = predictions(stream, windows, 5, CPU, torch.float32, tmp_path, lambda step: None)
    torch.testing.assert_close(found.logs, whole.logs)
    torch.testing.assert_close(found.index, whole.index)
    assert max(asked) <= tokens and sum(asked) == windows.numel()


def test_the_teacher_takes_fewer_windows_where_memory_runs_out(original, windows, tmp_path, monkeypatch):
    stream, completed = full_precision(original).stream, teacher.completed
    whole = predictions(stream, windows, 5, CPU, torch.float32, tmp_path, lambda step: None)

    def narrow(model, blocks, tokens, hidden):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError
        return completed(model, blocks, tokens, hidden)

    monkeypatch.setattr(teacher, "completed", narrow)
    found = predictions(stream, windows, 5, CPU, torch.float32, tmp_path, lambda step: None)
    torch.testing.assert_close(found.logs, whole.logs)
    torch.testing.assert_close(found.index, whole.index)


@pytest.mark.parametrize("tokens", [5, 61 * 16])
def test_the_hidden_states_kept_are_those_of_the_whole_model(original, windows, tmp_path, monkeypatch, tokens):
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.model(input_ids=windows, use_cache=False).last_hidden_state
    monkeypatch.setattr(teacher, "LOGITS", tokens * 61 * 4)
    kept = Kept(tmp_path, Meter())
    stream = full_precision(original).stream
    found = predictions(
        stream, windows, 5, CPU, torch.float32, tmp_path, lambda step: None, partial(kept.keep, "hidden")
    )
    rows = kept.rows("hidden")
    assert len(rows) == len(windows)
    for start in range(6):
        for stop in range(start + 1, 7):
            torch.testing.assert_close(rows[start:stop], expected[start:stop])
    assert float(found.power) == pytest.approx(float(expected.square().mean()), rel=1e-6)


def test_a_model_that_does_not_name_its_head_is_refused(original, windows, tmp_path, monkeypatch):
    stream = full_precision(original).stream
    monkeypatch.setattr(type(stream.model), "get_output_embeddings", lambda self: None)
    with pytest.raises(ApiqError, match=r"set refine\.hidden_weight to 0"):
        predictions(stream, windows, 5, CPU, torch.float32, tmp_path, lambda step: None, lambda start, rows: None)
