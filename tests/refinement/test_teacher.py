"""What streams through the blocks predicts what the whole model does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from apiq.checkpoint.loading import full_precision
from apiq.refinement.divergence import top
from apiq.refinement.teacher import predictions

CPU = torch.device("cpu")


@pytest.mark.parametrize("k", [5, 61])
def test_predictions_are_those_of_the_whole_model(original, windows, k):
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    with torch.no_grad():
        logs, index = top(model(input_ids=windows, use_cache=False).logits, k)
    steps = []
    found = predictions(full_precision(original).stream, windows, k, CPU, torch.float32, steps.append)
    torch.testing.assert_close(found.logs, logs)
    assert (found.index is None) == (k == 61)
    if index is not None:
        assert torch.equal(found.index, index)
    assert [step.done for step in steps] == [1, 2]
