"""The workspace during an experiment, after it, and when two runs want it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apiq.errors import ApiqError
from apiq.overrides import read_yaml
from apiq.profiles import change
from flows.workspace import alone, call, changed, experiment_name, refuse_taken

ROOT = Path(__file__).parents[2]
NAMED = ["-c", "user.name=Somebody", "-c", "user.email=some@body"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with parameters and metrics, never run."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    (tmp_path / "data" / "metrics.json").write_text('{"perplexity": 8.0}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def bits(place: Path) -> int:
    return read_yaml(place / "params.yaml")["quantize"]["bits"]


def test_parameters_are_changed_inside_and_as_before_outside(place: Path) -> None:
    before = state(place)
    with changed({"quantize.bits": 3}, place, print):
        assert bits(place) == 3
        (place / "data/metrics.json").write_text("{}")
        (place / "dvc.lock").write_text("schema: '2.0'\n")
    assert state(place) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_also_when_the_run_ends_badly(place: Path, error: type[BaseException]) -> None:
    before = state(place)
    with pytest.raises(error), changed({"quantize.bits": 3}, place, print):
        raise error
    assert state(place) == before


def test_a_killed_run_is_made_good_by_the_next_one(place: Path) -> None:
    before = state(place)
    script = f"""
import os
from pathlib import Path
from flows.workspace import changed
with changed({{"quantize.bits": 3}}, Path({str(place)!r}), print):
    os._exit(9)
"""
    subprocess.run([sys.executable, "-c", script], cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert bits(place) == 3
    told: list[str] = []
    with changed({}, place, told.append):
        assert bits(place) == 2
    assert state(place) == before
    assert "interrupted run" in told[0]


def test_parameters_that_were_edited_since_a_killed_run_stay(place: Path) -> None:
    with pytest.raises(RuntimeError), changed({"quantize.bits": 3}, place, print):
        shutil.copytree(place / ".prefect" / "kept", place / "killed")
        raise RuntimeError
    (place / "killed").rename(place / ".prefect" / "kept")
    change({"quantize.bits": 4}, place / "params.yaml")
    before, told = state(place), list[str]()
    with changed({}, place, told.append):
        assert bits(place) == 4
    assert told[-1] == "params.yaml was edited since a run changed it, and stays as it is."
    kept = {name for name in before if name.startswith(".prefect/kept/")}
    assert state(place) == {name: content for name, content in before.items() if name not in kept} and kept


def test_what_cannot_be_run_changes_nothing(place: Path) -> None:
    before = state(place)
    with pytest.raises(ApiqError, match=r"quantize\.bits is 9"), changed({"quantize.bits": 9}, place, print):
        pytest.fail("it ran")
    assert state(place) == before


def test_without_changes_the_workspace_is_left_to_the_run(place: Path) -> None:
    with changed({}, place, print):
        (place / "data/metrics.json").write_text("{}")
    assert (place / "data/metrics.json").read_text() == "{}"


def test_two_runs_take_turns(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.workspace.POLL", 0.05)
    script = f"""
import time
from pathlib import Path
from flows.workspace import alone
with alone(Path({str(place)!r}), print):
    print("in", flush=True)
    time.sleep(1)
    Path("left").touch()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", script], cwd=place, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    told: list[str] = []
    with alone(place, told.append):
        assert (place / "left").exists()
    other.communicate()
    assert told == ["another flow run works in this folder; waiting for it to end."]
    with alone(place, told.append):
        assert len(told) == 1


def test_an_experiment_is_named_after_what_it_changes() -> None:
    changes = {"quantize.bits": 3, "finetune.learning_rate": 1e-4, "calibration.corpus": "./a b.txt"}
    assert experiment_name(changes, "wise-owl") == (
        "quantize-bits-3-finetune-learning-rate-0-0001-calibration-corpus-a-b-txt-wise-owl"
    )


def test_many_changes_make_no_longer_name_than_a_file_has() -> None:
    changes = {"model.source": "/data/" + "deep/" * 60}
    name = experiment_name(changes, "wise-owl")
    assert len(name) < 120 and name.endswith("-wise-owl")


def test_experiments_need_git(place: Path) -> None:
    with pytest.raises(ApiqError, match=r"has no git commit, .* \(no repository here\): .* git init, and commit\."):
        refuse_taken("new", place)
    (place / ".dvc").mkdir()
    (place / ".dvc/config.local").touch()
    with pytest.raises(ApiqError, match=r"git init, then dvc config --local --unset core\.no_scm, and commit"):
        refuse_taken("new", place)


@pytest.mark.parametrize("name", ["has space", "a/b", "..", "x~1", "end.lock"])
def test_a_name_that_git_does_not_take_is_refused_at_once(place: Path, name: str) -> None:
    for command in (["init", "--quiet"], ["add", "."], [*NAMED, "commit", "--quiet", "--message", "begin"]):
        call(["git", *command], place)
    with pytest.raises(ApiqError, match="cannot be the name of an experiment; take letters, digits and -"):
        refuse_taken(name, place)


def test_a_failing_command_is_told_in_one_sentence(place: Path) -> None:
    with pytest.raises(ApiqError, match=r"`-c .*` failed: ZeroDivisionError"):
        call([sys.executable, "-c", "1 / 0"], place)
    chatty = "import sys; print('out'); sys.stderr.write('ERROR: why\\nhelp'); sys.exit(1)"
    with pytest.raises(ApiqError, match=r"failed: ERROR: why$"):
        call([sys.executable, "-c", chatty], place)
    with pytest.raises(ApiqError, match="there is no program"):
        call(["no-such-program-anywhere"], place)
