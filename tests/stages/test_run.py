"""What every stage does around its one call of the library."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from apiq.errors import ApiqError
from stages import read_params, timed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo's parameters, as the current directory."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(place: Path, body: str) -> subprocess.Popen[str]:
    """A stage `quantize` with the given body of main."""
    main = f"def main(params, progress):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
    script = f"import sys\nfrom pathlib import Path\nfrom stages import run\n{main}\nrun('quantize', main)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(place: Path, body: str) -> tuple[int, str]:
    process = start(place, body)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_a_stage_gets_all_parameters_and_leaves_its_cost(place: Path) -> None:
    status, error = finish(place, "Path('seen').write_text(str(params.quantize.bits))")
    assert status == 0, error
    assert (place / "seen").read_text() == "2"
    cost = json.loads((place / "data/timing/quantize.json").read_text())
    assert {"seconds", "cpu_seconds", "peak_memory_mb"} <= cost.keys()


def test_a_refusal_is_one_sentence_and_status_2(place: Path) -> None:
    status, error = finish(place, "from apiq.errors import ApiqError; raise ApiqError('there is no sun.')")
    assert (status, error) == (2, "there is no sun.\n")
    assert not (place / "data/timing").exists()


def test_a_defect_keeps_its_traceback(place: Path) -> None:
    status, error = finish(place, "raise KeyError('x')")
    assert status == 1
    assert "Traceback" in error


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  bits: 2", "  bits: 9", "quantize.bits is 9; it should be at least 1 and at most 8."),
        ("  bits: 2", "  bit: 2", "quantize.bit is not a parameter; did you mean bits?"),
        ("  rank: 16", "  rank: 50000", "quantize.rank is 50000; it should be at most"),
        ("  title: ApiQ", "  titel: ApiQ", "report.titel is not a parameter; did you mean title?"),
        ("  bits: 2", "  bits: [", "params.yaml is not valid YAML"),
    ],
)
def test_nothing_is_done_with_parameters_that_cannot_be_run(place: Path, old: str, new: str, told: str) -> None:
    text = (place / "params.yaml").read_text()
    assert old in text
    (place / "params.yaml").write_text(text.replace(old, new, 1))
    status, error = finish(place, "Path('seen').write_text('work was done')")
    assert status == 2
    assert error.startswith(told)
    assert error.count("\n") == 1
    assert not (place / "seen").exists()


def test_params_yaml_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ApiqError, match="there is no file"):
        read_params(tmp_path / "params.yaml")


def test_termination_unwinds_the_stage(place: Path) -> None:
    body = """
        import time
        from apiq.files import new_folder
        with new_folder("data/quantized") as folder:
            (folder / "half").write_text("")
            Path("started").touch()
            time.sleep(60)
    """
    process = start(place, body)
    while not (place / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert [path.name for path in (place / "data").iterdir()] == ["tasks"]


def test_progress_comes_line_by_line(place: Path) -> None:
    body = """
        from apiq.progress import Step
        progress(Step("quantize", 0, 2, "block 1/2"))
        progress(Step("quantize", 2, 2, "block 2/2", 0.5))
    """
    status, error = finish(place, body)
    assert status == 0
    assert [line.split()[:3] for line in error.splitlines()] == [["quantize", "0/2", "0%"], ["quantize", "2/2", "100%"]]


def test_time_is_taken_only_of_what_succeeds(tmp_path: Path) -> None:
    with timed("good", tmp_path):
        sum(range(2_000_000))
    cost = json.loads((tmp_path / "good.json").read_text())
    assert cost["seconds"] > 0
    assert cost["cpu_seconds"] > 0
    assert 10 < cost["peak_memory_mb"] < 100_000
    with pytest.raises(ValueError, match="bad"), timed("bad", tmp_path):
        raise ValueError("bad")
    assert not (tmp_path / "bad.json").exists()
