"""What streams through the blocks predicts what the whole model does."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from apiq.checkpoint.loading import full_precision
from apiq.refinement import teacher
from apiq.refinement.divergence import top
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
