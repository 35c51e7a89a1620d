import gc
import hashlib
import json
import weakref
from types import SimpleNamespace

import pytest

from apiq.errors import ApiqError
from apiq.evaluation import run
from apiq.evaluation.run import compare, evaluate, metrics, rounded
from apiq.params import EvaluateParams, EvaluationText


@pytest.fixture
def params(tmp_path):
    """The alphabet, twice: as a text of 27 tokens, and as rows."""
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    rows.write_text("\n".join(json.dumps({"body": letter}) for letter in "zyxwvutsrqponmlk"))
    corpora = {
        "forwards": EvaluationText(text=str(text), length=5),
        "backwards": EvaluationText(text=str(rows), column="body", join=" ", length=4, windows=3),
    }
    return EvaluateParams(perplexity=corpora, batch_size=2)


@pytest.fixture
def with_task(params, tmp_path):
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "a b", "choices": ["c", "e"], "label": 0}))
    (tmp_path / "task.yaml").write_text(
        "task: next\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\nmetric_list: [{metric: acc}]'
    )
    return params.model_copy(update={"tasks": ["next"], "task_folder": str(tmp_path)})


def test_every_corpus_is_measured_on_its_own_windows(alphabet, tokenizer, params, tmp_path):
    result = evaluate(alphabet, tokenizer, params)
    assert result["perplexity"]["forwards"] == pytest.approx(1, abs=1e-5)
    assert result["perplexity"]["backwards"] > 1e6
    protocol = result["protocol"]["perplexity"]
    assert (protocol["forwards"]["windows"], protocol["forwards"]["length"]) == (5, 5)  # of 27 tokens
    assert (protocol["backwards"]["windows"], protocol["backwards"]["length"]) == (3, 4)
    assert protocol["forwards"]["sha256"] == hashlib.sha256((tmp_path / "text.txt").read_bytes()).hexdigest()
    assert result["tasks"] == {}


def test_models_stand_side_by_side(alphabet, uniform, tokenizer, with_task):
    models = {
        "full": lambda: SimpleNamespace(model=alphabet, tokenizer=tokenizer),
        "quantized": lambda: SimpleNamespace(model=uniform, tokenizer=tokenizer),
    }
    found = metrics(compare(models, with_task))
    assert list(found) == ["full", "quantized"]
    assert found["quantized"]["perplexity"] == {"forwards": 29.0, "backwards": 29.0}
    assert found["full"]["perplexity"]["forwards"] == 1.0
    assert found["full"]["tasks"] == {"next": {"acc": 1.0}}
    json.dumps(found, allow_nan=False)


def test_one_model_is_in_memory_at_a_time(uniform, tokenizer, params):
    alive = weakref.WeakSet()

    class Loaded:
        def __init__(self):
            gc.collect()
            assert not alive
            alive.add(self)
            self.model, self.tokenizer = uniform, tokenizer

    compare({"one": Loaded, "two": Loaded, "three": Loaded}, params)


def test_texts_are_read_and_tokenized_once(uniform, tokenizer, params, monkeypatch):
    calls = []
    for name in ("load_corpus", "tokenize"):
        original = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    models = dict.fromkeys(["one", "two"], lambda: SimpleNamespace(model=uniform, tokenizer=tokenizer))
    compare(models, params)
    assert sorted(calls) == ["load_corpus"] * 2 + ["tokenize"] * 2


def test_progress_names_model_and_corpus(uniform, tokenizer, params):
    steps = []
    compare({"full": lambda: SimpleNamespace(model=uniform, tokenizer=tokenizer)}, params, steps.append)
    assert steps[0].detail == "full: forwards: window 2/5"


def test_windows_too_long_are_refused_before_anything_is_measured(uniform, tokenizer, params):
    params.perplexity["backwards"] = params.perplexity["backwards"].model_copy(update={"length": 16})
    uniform.config.max_position_embeddings = 8
    steps = []
    with pytest.raises(ApiqError, match="the windows have 16 tokens; the context of the model takes at most 8"):
        evaluate(uniform, tokenizer, params, steps.append)
    assert steps == []


def test_tasks_that_cannot_run_are_refused_before_anything_is_measured(uniform, tokenizer, with_task, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(path.read_text().replace("multiple_choice", "generate_until").replace("label", '"c"'))
    steps = []
    with pytest.raises(ApiqError, match="max_gen_toks of the task next is 256"):
        evaluate(uniform, tokenizer, with_task, steps.append)
    assert not steps


def test_rounding_keeps_six_digits_of_floats_only():
    assert rounded({"a": [1], "b": {"c": 1234567.8, "d": 7, "e": "x"}, "f": 0.1 + 0.2}) == {
        "a": [1],
        "b": {"c": 1234570.0, "d": 7, "e": "x"},
        "f": 0.3,
    }


def test_what_is_kept_of_a_stopped_evaluation_counts_for_the_same_documents_only(
    alphabet, uniform, tokenizer, with_task, tmp_path
):
    def model():
        return SimpleNamespace(model=alphabet, tokenizer=tokenizer)

    def stopped():
        raise KeyboardInterrupt

    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyboardInterrupt):
        compare({"full": model, "quantized": stopped}, with_task, kept=tmp_path / "kept")
    both = {"full": stopped, "quantized": model}
    assert compare(both, with_task, kept=tmp_path / "kept")["full"]["tasks"] == {"next": {"acc": 1.0}}
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "a b", "choices": ["c", "e"], "label": 1}))
    with pytest.raises(KeyboardInterrupt):
        compare(both, with_task, kept=tmp_path / "kept")
