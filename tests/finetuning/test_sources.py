import pytest

from apiq.errors import ApiqError
from apiq.finetuning.examples import IGNORED
from apiq.finetuning.sources import prepare
from apiq.params import FinetuneParams


def test_language_modelling_covers_the_text_once(tokenizer, params, text):
    examples = prepare(params, tokenizer, 32)
    assert examples.counts == {"train_windows": 32, "held_out_windows": 8, "repeated_windows": 0}
    windows = [tuple(example["input_ids"]) for example in examples.train + examples.held_out]
    tokens = tokenizer(text.read_text())["input_ids"]
    assert sorted(windows) == sorted(tuple(tokens[i : i + 16]) for i in range(0, 40 * 16, 16))
    assert all(example["labels"] == example["input_ids"] for example in examples.train)


def test_pairs_are_encoded_counted_and_cut(tokenizer, pairs):
    params = FinetuneParams(task="instruction", pairs=str(pairs), length=8, held_out=0.2)
    examples = prepare(params, tokenizer, 32)
    counts = {"train": 5, "held_out": 1, "truncated": 1, "dropped": 2, "repeated": 0}
    assert examples.counts == {f"{name}_pairs": count for name, count in counts.items()}
    both = examples.train + examples.held_out
    e_b_c_d = [0, 5, 2, 3, 4, 27]  # <s> e b, c d </s>
    assert {"input_ids": e_b_c_d, "labels": [IGNORED] * 3 + e_b_c_d[3:]} in both
    assert {"input_ids": [0, 1, 2, 3, 4, 5, 6, 7], "labels": [IGNORED] * 3 + [3, 4, 5, 6, 7]} in both


def test_a_pair_that_repeats_is_trained_on_or_held_out_never_both(tokenizer, pairs):
    pairs.write_text("\n".join([pairs.read_text()] * 5))
    examples = prepare(FinetuneParams(task="instruction", pairs=str(pairs), length=8, held_out=0.4), tokenizer, 32)
    assert (examples.counts["train_pairs"], examples.counts["held_out_pairs"]) == (20, 10)
    assert examples.counts["repeated_pairs"] == 24
    assert not [example for example in examples.held_out if example in examples.train]


def test_the_source_is_known_by_its_name_wherever_it_lies(tokenizer, params, pairs, text, monkeypatch):
    monkeypatch.chdir(text.parent)
    for source in (str(text), text.name):
        examples = prepare(params.model_copy(update={"text": source}), tokenizer, 32)
        assert examples.source["name"] == "letters.txt"
    params = FinetuneParams(task="instruction", pairs=str(pairs), length=8)
    assert prepare(params, tokenizer, 32).source["name"] == "pairs.jsonl"


def test_pairs_that_are_no_file_are_not_told_of_corpora(tokenizer):
    params = FinetuneParams(task="instruction", pairs="demo")
    with pytest.raises(ApiqError, match=r"no corpus demo; give a .jsonl or .parquet file or a folder of them\."):
        prepare(params, tokenizer, None)


def test_a_file_whose_answers_never_begin_is_refused(tokenizer, pairs):
    params = FinetuneParams(task="instruction", pairs=str(pairs), length=3)
    with pytest.raises(ApiqError, match=r"none of the 8 pairs .* finetune.length=3"):
        prepare(params, tokenizer, 32)


def test_a_length_beyond_the_context_is_refused(tokenizer, params):
    with pytest.raises(ApiqError, match=r"finetune.length is 16; the context of the model takes at most 8"):
        prepare(params, tokenizer, 8)


def test_a_missing_column_is_named(tokenizer, pairs):
    params = FinetuneParams(task="instruction", pairs=str(pairs), prompt_column="question")
    with pytest.raises(ApiqError, match=r"pairs.jsonl, line 1 has no 'question'"):
        prepare(params, tokenizer, None)
