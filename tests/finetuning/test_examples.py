import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.errors import ApiqError
from apiq.finetuning.examples import IGNORED, answer_only, collate, split, whole


def test_the_prompt_is_read_and_the_answer_is_learned():
    assert answer_only([0, 5, 6], [7, 8], 10) == {
        "input_ids": [0, 5, 6, 7, 8],
        "labels": [IGNORED, IGNORED, IGNORED, 7, 8],
    }


def test_the_end_is_cut_and_nothing_left_is_no_example():
    example = answer_only([0, 5, 6], [7, 8], 4)
    assert example == {"input_ids": [0, 5, 6, 7], "labels": [IGNORED] * 3 + [7]}
    assert answer_only([0, 5, 6], [7, 8], 3) is None
    assert answer_only([], [7], 10) is None  # nothing comes before it that could predict it


def test_the_loss_is_that_of_the_answer_alone_whatever_the_padding():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, **shape)).eval()
    batch = collate([answer_only([0, 1, 2, 3], [4, 5], 10), answer_only([0], [6, 7], 10)])
    losses = []
    for tokens, first in (([0, 1, 2, 3, 4, 5], 4), ([0, 6, 7], 1)):
        ids = torch.tensor(tokens)
        logits = model(input_ids=ids[None]).logits[0]
        losses.append(functional.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum"))
    assert model(**batch).loss.item() == pytest.approx(sum(losses).item() / 4, rel=1e-5)


def test_batches_are_padded_on_the_right():
    batch = collate([whole([1, 2, 3]), whole([4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]


def test_split_is_a_partition_that_the_seed_decides():
    train, held_out = split(range(40), 0.2, 7)
    assert (len(train), len(held_out)) == (32, 8)
    assert sorted(train + held_out) == list(range(40))
    assert split(range(40), 0.2, 7) == (train, held_out)
    assert split(range(40), 0.2, 8)[1] != held_out


def test_split_holds_out_at_least_one_and_needs_two():
    assert [len(part) for part in split(range(3), 0.01, 0)] == [2, 1]
    with pytest.raises(ApiqError, match="there is 1 example"):
        split([0], 0.5, 0)
