"""One stage as a command, in a scratch repository whose stages only pretend."""

from functools import partial
from pathlib import Path

import pytest
import torch

from apiq.errors import ApiqError
from apiq.params import parse
from flows.pipeline import STAGES, StageRefused, gpu_slot, read_progress, reproduce
from flows.processes import stop
from flows.workspace import call, dvc
from stages import DATA

ROOT = Path(__file__).parents[2]


def silent(line: str) -> None:
    """Take no notice."""


def test_stages_are_those_of_the_pipeline_in_order() -> None:
    assert list(STAGES) == [
        path.stem for path in sorted((ROOT / "stages").glob("[!_]*.py"), key=lambda p: STAGES.index(p.stem))
    ]


@pytest.mark.parametrize(
    ("line", "percent", "text"),
    [
        (
            "quantize 3/6 50% block 4/6 epoch 3/20 loss 0.0123 ETA 12 s",
            50.0,
            "quantize 3/6 block 4/6 epoch 3/20 loss 0.0123 ETA 12 s",
        ),
        ("perplexity full 1/3 33%", 33.3, "perplexity full 1/3"),
        ("demo 600/600 100% loss 2.1", 100.0, "demo 600/600 loss 2.1"),
    ],
)
def test_progress_is_read_from_a_line(line: str, percent: float, text: str) -> None:
    mark = read_progress(line)
    assert mark is not None
    assert (mark.percent, mark.text) == (percent, text)


@pytest.mark.parametrize("line", ["Running stage 'quantize':", "3/6", "", "quantize 0/0 0%", "ratio 1/2 of it"])
def test_other_lines_tell_no_progress(line: str) -> None:
    assert read_progress(line) is None


def test_progress_is_read_from_what_a_stage_really_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from apiq.progress import Step
    from apiq.terminal import progress_bar

    with progress_bar("quantize") as progress:
        progress(Step("quantize", 0, 6, "block 1/6", 0.25))
        progress(Step("quantize", 6, 6, "block 6/6", 0.0123))
    marks = [read_progress(line) for line in capsys.readouterr().err.splitlines()]
    assert [mark.percent for mark in marks if mark] == [0.0, 100.0]


@pytest.mark.parametrize(
    ("device", "here", "slot"),
    [
        ("auto", True, "gpu0"), ("auto", False, None), ("cuda", True, "gpu0"), ("cuda:3", True, "gpu3"),
        ("cpu", True, None), ("mps", False, None),
    ],
)  # fmt: skip
def test_a_stage_on_a_gpu_takes_its_slot(
    device: str, here: bool, slot: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    params = parse({"quantize": {"device": device}})
    assert gpu_slot("quantize", params) == slot
    assert gpu_slot("calibration", params) is None


@pytest.mark.slow
def test_a_stage_runs_once_comes_from_the_cache_and_can_fail(repository: Path) -> None:
    lines: list[str] = []
    assert reproduce("model", repository, lines.append) == "Ran"
    assert any(read_progress(line) for line in lines)
    assert not any("git add" in line for line in lines)
    assert reproduce("model", repository, silent) == "Unchanged"
    assert (repository / DATA / "model" / "out.txt").exists()

    (repository / "dvc.lock").unlink()
    assert reproduce("model", repository, silent) == "Cached"

    for status, kind in ((1, ApiqError), (2, StageRefused), (22, ApiqError)):
        (repository / "break-calibration").write_text(str(status))
        with pytest.raises(ApiqError, match=r"^the stage calibration failed: the stand-in was told to fail\.$") as told:
            reproduce("calibration", repository, silent)
        assert told.type is kind
    assert reproduce("calibration", repository, silent) == "Ran"


@pytest.mark.slow
def test_an_interrupted_stage_leaves_no_process_and_no_lock(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "100")
    monkeypatch.setattr("flows.processes.stop", partial(stop, patience=60.0))  # also on a busy machine

    def cancel(line: str) -> None:
        if "python -m stages.model" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("model", repository, cancel)
    assert (repository / ".dvc/tmp/rwlock").read_text() == "{}"
    assert not (repository / "data/model").exists()
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    call(dvc("status"), repository)
    assert reproduce("model", repository, silent) == "Ran"
