"""Windows are drawn from the model's distribution, each by its own generator."""

import pytest
import torch
from transformers import GenerationConfig

from apiq.checkpoint.loading import load
from apiq.refinement import generation
from apiq.refinement.generation import _Drawn, generated


def written(model, windows, count=8):
    return generated(model, windows, count, 3, 0, torch.float32, lambda step: None)


def test_how_many_are_written_side_by_side_changes_no_window(make, windows, monkeypatch):
    model = load(make()).model
    found = []
    for size in (1, 3, 8):
        monkeypatch.setattr(generation, "_at_once", lambda *_, size=size: size)
        found.append(written(model, windows))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len({tuple(row.tolist()) for row in found[0]}) == 8


def test_memory_that_runs_out_changes_no_window(make, windows, monkeypatch):
    model = load(make()).model
    expected, sampled = written(model, windows), generation._sampled

    def narrow(model, prompts, *rest):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return sampled(model, prompts, *rest)

    monkeypatch.setattr(generation, "_sampled", narrow)
    assert torch.equal(written(model, windows), expected)


@pytest.mark.parametrize("free, size", [(0, 1), (3, 2), (5.9, 4), (10**9, 256)])
def test_a_little_more_or_less_memory_gives_the_same_batches(make, windows, monkeypatch, free, size):
    model = load(make()).model
    each = 2 * 2 * 2 * 8 * 16 * 4  # keys and values, layers, heads, width, tokens, bytes
    monkeypatch.setattr(generation, "free_ram", lambda: int(free * each * generation.SHARE))
    assert generation._at_once(model, 16, torch.device("cpu"), torch.float32) == size


def test_tokens_are_drawn_as_the_softmax_has_them():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 3.0])
    rows = 20000
    drawn = _Drawn(list(range(rows)), torch.device("cpu"))(torch.empty(0), logits.expand(rows, 5)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / rows
    assert torch.allclose(shares, logits.softmax(-1), atol=0.015)  # four standard deviations of the largest share


def test_the_models_own_settings_of_generation_change_nothing(make, windows):
    model = load(make()).model
    expected, base = written(model, windows, 64), model.get_base_model()
    ends = [int(expected[0, 5]), int(expected[1, 7])]
    base.generation_config = own = GenerationConfig(
        eos_token_id=ends, repetition_penalty=1.3, no_repeat_ngram_size=2, suppress_tokens=[4], do_sample=True,
        min_p=0.2, temperature=0.5, max_length=7,
    )  # fmt: skip
    assert torch.equal(written(model, windows, 64), expected)
    assert base.generation_config is own


def test_every_token_is_written_and_so_is_an_end_of_text(make, windows):
    model = load(make()).model
    model.get_base_model().generation_config = GenerationConfig(eos_token_id=7)
    tokens = written(model, windows, 256)[:, 3:]
    assert (tokens[:, :-1] == 7).any() and len(tokens.unique()) == 61
