"""The regression check lets noise pass and nothing else, and leaves the tree alone."""

import json
import math
import subprocess
import sys

import pytest

from apiq.files import read_json
from apiq.overrides import read_yaml
from ci import regression
from ci.regression import Tolerance, judge

FIVE_PERCENT = {"evaluate.*": Tolerance("rounding", relative=0.05), "bits": Tolerance("counted")}
COMMITTED = {"evaluate": {"full": 4.0, "quantized": 8.0}, "bits": 2.5}


def flat(metrics):
    return {f"evaluate.{name}": value for name, value in metrics["evaluate"].items()} | {"bits": metrics["bits"]}


def changes(**new):
    old = flat(COMMITTED)
    return {name: {"old": value, "new": new.get(name.rpartition(".")[2], value)} for name, value in old.items()}


def test_noise_passes():
    assert judge(changes(quantized=8.39), FIVE_PERCENT) == []


@pytest.mark.parametrize("new", [8.41, 7.59, math.nan, math.inf])
def test_a_metric_past_its_tolerance_is_found(new):
    (finding,) = judge(changes(quantized=new), FIVE_PERCENT)
    assert "evaluate.quantized went from 8" in finding
    assert "0.4" in finding


def test_a_metric_that_is_a_word_is_compared_as_one():
    change = {"bits": {"old": "apiq-bw", "new": "apiq-bw"}, "evaluate.by": {"old": "apiq-bw", "new": "rtn"}}
    assert judge(change, FIVE_PERCENT) == ["evaluate.by went from apiq-bw to rtn."]


def test_without_a_tolerance_nothing_may_move():
    (finding,) = judge(changes(bits=2.500001), FIVE_PERCENT)
    assert finding.startswith("bits went from 2.5")


def test_absolute_and_relative_parts_add_up():
    assert Tolerance("", relative=0.1, absolute=1.0).allowed(-20) == 3.0


@pytest.mark.parametrize(("old", "new", "word"), [(None, 1.0, "new"), (1.0, None, "gone")])
def test_a_metric_that_comes_or_goes_is_found(old, new, word):
    (finding,) = judge({**changes(), "evaluate.tuned": {"old": old, "new": new}}, FIVE_PERCENT)
    assert f"evaluate.tuned is {word}" in finding


def test_a_metric_that_no_tolerance_fits_and_one_that_fits_no_metric_are_found():
    findings = judge(changes(), {"evaluate.*": Tolerance(""), "speed": Tolerance("")})
    assert findings == ["bits has no tolerance in ci/tolerances.yaml.", "the tolerance of speed fits no metric."]


def test_nothing_to_compare_is_found():
    assert judge({}, {}) == ["there are no metrics to compare."]


def test_the_tolerances_fit_the_committed_metrics():
    tolerances = {name: Tolerance(**entry) for name, entry in read_yaml(regression.ROOT / "ci/tolerances.yaml").items()}
    metrics = leaves(read_json(regression.ROOT / regression.METRICS))
    assert judge({name: {"old": value, "new": value} for name, value in metrics.items()}, tolerances) == []


def leaves(values, name=""):
    if not isinstance(values, dict):
        return {name: values}
    return {
        key: leaf
        for inner, below in values.items()
        for key, leaf in leaves(below, f"{name}.{inner}".strip(".")).items()
    }


def test_the_summary_tells_what_was_lost_and_what_fitting_left():
    quantized = {"bits": {"total": 2.5}, "blocks": [{"name": "block.0", "loss_first": 4.0, "loss_last": 1.0}]}
    evaluation = {"full": {"perplexity": {"demo": 10.0}}, "quantized": {"perplexity": {"demo": 10.0 * math.e}}}
    found = regression.summary(quantized, evaluation)
    assert found["lost"] == {"quantized": pytest.approx(1.0)}
    assert found["error_left"] == {"block.0": 0.25}
    assert found["bits"] == {"total": 2.5}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with committed metrics and tolerances, an ignored file and one that is new; the pipeline is made up."""
    root = tmp_path / "tree"
    files = {
        ".dvc/config": "",
        ".gitignore": "ignored\n",
        "ci/metrics.json": json.dumps(COMMITTED),
        "ci/tolerances.yaml": '"evaluate.*": {relative: 0.05, reason: noise}\nbits: {reason: counted}\n',
    }
    for name, text in {**files, "ignored": "", "gone": ""}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "gone").unlink()
    (root / "new").write_text("")
    monkeypatch.setattr(regression, "ROOT", root)
    return root


def run(monkeypatch, measured, *arguments):
    def measure(copy):
        regression.copy_tree(copy)
        return measured

    monkeypatch.setattr(regression, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["regression", *arguments])
    return regression.main()


def test_a_made_up_regression_fails_the_run(tree, monkeypatch, capsys):
    worse = {"evaluate": {"full": 4.0, "quantized": 9.0}, "bits": 2.5}
    assert run(monkeypatch, worse) == 1
    assert "evaluate.quantized went from 8 to 9; allowed is 0.4." in capsys.readouterr().out
    assert read_json(tree / "ci/metrics.json") == COMMITTED


def test_the_committed_metrics_pass_the_run(tree, monkeypatch, capsys):
    assert run(monkeypatch, COMMITTED) == 0
    assert "3 metrics, 0 findings" in capsys.readouterr().out


def test_update_writes_what_was_measured(tree, monkeypatch):
    better = {"evaluate": {"full": 4.0, "quantized": 6.0}, "bits": 2.5}
    assert run(monkeypatch, better, "--update") == 0
    assert read_json(tree / "ci/metrics.json") == better


def test_the_copy_is_the_tree_as_it_is(tree, tmp_path):
    regression.copy_tree(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").rglob("*") if ".git" not in path.parts and path.is_file()}
    assert names == {"config", ".gitignore", "metrics.json", "tolerances.yaml", "new"}
    left = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path / "copy", capture_output=True, check=True)
    assert left.stdout == b""
