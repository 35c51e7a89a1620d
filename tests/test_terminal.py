"""Progress in a log: seldom, with an ETA at the pace of the part that runs."""

import re

import pytest

from apiq import terminal
from apiq.progress import Step


@pytest.fixture
def lines(monkeypatch, capsys):
    """Show steps at given seconds; what was printed."""

    def show(*steps):
        clock = iter([seconds for seconds, _ in steps])
        monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
        with terminal.progress_bar("refine") as progress:
            for _, step in steps:
                progress(step)
        return capsys.readouterr().err.splitlines()

    return show


def test_the_eta_is_that_of_the_pace_so_far(lines):
    told = lines((100, Step("quantize", 0, 10)), (110, Step("quantize", 2, 10, "block 3/10", 0.25)))
    assert told == ["quantize 0/10 0%", "quantize 2/10 20% block 3/10 loss 0.25 ETA 40 s"]


def test_another_part_of_a_phase_has_its_own_pace(lines):
    parts = [(0, 256, 1024), (99, 1024, 1024), (100, 0, 200), (110, 20, 200), (120, 10, 200), (130, 20, 200)]
    told = lines(*((second, Step("refine", done, total)) for second, done, total in parts))
    assert [re.findall(r"ETA (\d+)", line) for line in told] == [[], [], [], ["90"], [], ["180"]]


def test_steps_in_quick_succession_are_one_line(lines):
    assert len(lines(*((second / 10, Step("quantize", second, 1000)) for second in range(40)))) == 1
