import json
import math
import random
import string

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from apiq.errors import ApiqError
from apiq.evaluation.tasks import load_suite, run_suite

CHOICE = """
task: next_letter
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: go_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 3, until: ["</s>"]}}
filter_list:
  - {{name: strict, filter: [{{function: take_first}}]}}
  - {{name: letter, filter: [{{function: regex, regex_pattern: "([a-z])"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: alphabet
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture
def folder(tmp_path):
    """Three questions of which the alphabet model knows two, and a page that it knows by heart."""
    letters = list(string.ascii_lowercase)
    rows = [
        {"question": "a b c", "choices": letters[:8], "label": 3, "answer": "d", "page": " ".join(letters)},
        {"question": "x y", "choices": letters[18:], "label": 7, "answer": "z", "page": "a b c d"},
        {"question": "k l", "choices": ["m", "n"], "label": 1, "answer": "n", "page": "a b"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in {"choice": CHOICE, "generation": GENERATION, "rolling": ROLLING}.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return tmp_path


def test_multiple_choice_counts_the_right_answers(alphabet, tokenizer, folder):
    suite = load_suite(["next_letter"], folder)
    record = run_suite(alphabet, tokenizer, suite, batch_size=2)["next_letter"]
    assert record["metrics"]["acc"] == pytest.approx(2 / 3)
    assert record["metrics"]["acc_norm"] == pytest.approx(2 / 3)
    assert record["metrics"]["acc_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert (record["documents"], record["fewshot"]) == (3, 0)


def test_a_suite_serves_one_model_after_another(alphabet, uniform, tokenizer, folder):
    suite = load_suite(["next_letter"], folder)
    first = run_suite(alphabet, tokenizer, suite)
    assert run_suite(uniform, tokenizer, suite) != first
    assert run_suite(alphabet, tokenizer, suite) == first


def test_generation_carries_the_filter_in_the_name_of_the_metric(alphabet, tokenizer, folder):
    metrics = run_suite(alphabet, tokenizer, load_suite(["go_on"], folder))["go_on"]["metrics"]
    assert metrics["exact_match.strict"] == pytest.approx(1 / 3)  # "z" ends the text; "d e f" is not "d"
    assert metrics["exact_match.letter"] == pytest.approx(2 / 3)


def test_rolling_perplexity_is_that_of_the_words(alphabet, tokenizer, folder):
    metrics = run_suite(alphabet, tokenizer, load_suite(["alphabet"], folder))["alphabet"]["metrics"]
    # every letter costs nothing; lm-eval also has the <s> of each of the 3 pages predicted after another <s>,
    # which is 4 * 32 ** 0.5 nats away from the letter a; there are 26 + 4 + 2 words
    assert metrics == {"word_perplexity": pytest.approx(math.exp(3 * 4 * 32**0.5 / 32), rel=1e-4)}


def test_limit_takes_the_first_documents(alphabet, tokenizer, folder):
    record = run_suite(alphabet, tokenizer, load_suite(["next_letter"], folder), limit=2)["next_letter"]
    assert (record["metrics"]["acc"], record["documents"]) == (1, 2)


def test_reports_requests_and_keeps_quiet_and_the_random_state(alphabet, tokenizer, folder, capfd):
    steps, states = [], (random.getstate(), torch.get_rng_state())
    run_suite(alphabet, tokenizer, load_suite(["next_letter"], folder), progress=steps.append)
    assert (steps[-1].detail, steps[-1].done, steps[-1].total) == ("next_letter", 18, 18)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert capfd.readouterr() == ("", "")


def test_the_tokenizer_stays_as_it_was(alphabet, tokenizer, folder):
    run_suite(alphabet, tokenizer, load_suite(["next_letter"], folder))
    assert tokenizer.pad_token is None


def test_unknown_task_is_named_with_a_near_one(folder, monkeypatch):
    monkeypatch.setattr("apiq.evaluation.tasks.TaskManager", _local_only)
    with pytest.raises(ApiqError, match=r"evaluate.tasks names next_leter.*did you mean next_letter\?"):
        load_suite(["next_leter"], folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ApiqError, match=r"there is no folder .*nowhere"):
        load_suite(["x"], tmp_path / "nowhere")


def test_a_task_without_its_data_is_one_sentence(folder):
    (folder / "rows.jsonl").unlink()
    with pytest.raises(ApiqError, match="the lm-eval task next_letter cannot be loaded"):
        load_suite(["next_letter"], folder)


def _local_only(**arguments):
    """lm-eval's manager without the built-in tasks, whose index takes long to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(**(arguments | {"include_defaults": False}))


def test_a_tokenizer_that_begins_no_text_is_refused(alphabet, tokenizer, folder):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ApiqError, match="neither a bos nor an eos token"):
        run_suite(alphabet, bare, load_suite(["next_letter"], folder))


@pytest.mark.parametrize(("asked", "longest"), [("max_gen_toks: 64", 64), ("max_new_tokens: 70", 70), ("", 256)])
def test_answers_as_long_as_the_context_are_refused(alphabet, tokenizer, folder, asked, longest):
    path = folder / "generation.yaml"
    path.write_text(path.read_text().replace("max_gen_toks: 3,", f"{asked}," if asked else ""))
    with pytest.raises(ApiqError, match=f"max_gen_toks of the task go_on is {longest}; it must be less than 64"):
        run_suite(alphabet, tokenizer, load_suite(["go_on"], folder))


def test_without_a_token_that_ends_an_answer_only_scoring_is_possible(alphabet, tokenizer, folder):
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", unk_token="<unk>")
    run_suite(alphabet, endless, load_suite(["next_letter"], folder))
    with pytest.raises(ApiqError, match="go_on lets the model write, and the tokenizer has no eos token"):
        run_suite(alphabet, endless, load_suite(["go_on"], folder))


def test_a_task_that_fails_is_named_whatever_the_error(uniform, tokenizer, folder):
    with torch.no_grad():
        uniform.lm_head.weight.copy_(-2e4 * torch.eye(29, 32).roll(1, dims=0))
    with pytest.raises(ApiqError, match=r"cannot run the task alphabet \(OverflowError: .*\); take it out of evaluate"):
        run_suite(uniform, tokenizer, load_suite(["alphabet"], folder))
