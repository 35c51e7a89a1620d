"""The cache with room gives what the growing one gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from apiq.refinement.cache import Roomy, roomy_cache


def test_appending_gives_what_concatenation_gives():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = Roomy(9), DynamicLayer()
    for tokens in (4, 1, 3, 1):
        new = [torch.randn(2, 3, tokens, 5, generator=generator) for _ in range(2)]
        for own, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(own, other)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_more_tokens_than_there_is_room_for_are_an_error():
    layer = Roomy(2)
    with pytest.raises(RuntimeError):
        layer.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))


def test_a_model_writes_the_same_with_both(original, windows):
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    how = {
        "attention_mask": torch.ones_like(windows[:, :5]),
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "pad_token_id": 0,
    }
    expected = model.generate(windows[:, :5], past_key_values=DynamicCache(config=model.config), **how)
    assert torch.equal(model.generate(windows[:, :5], past_key_values=roomy_cache(model, 14), **how), expected)
