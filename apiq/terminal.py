"""How progress looks on a terminal, and in a log: always on stderr, so that stdout stays clean."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from apiq.progress import Progress, Step

LINE_EVERY = 5.0
"""Seconds between two lines in a log."""


@contextlib.contextmanager
def progress_bar(phase: str) -> Iterator[Progress]:
    """A callback that shows each Step: a bar with ETA on a terminal, else a line every few seconds.

    A line reads `quantize 3/6 52% block 4/6 epoch 3/20 loss 0.0123 ETA 12 s`.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.fields[phase]}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console, transient=False) as bar:
        tasks: dict[str, TaskID] = {}
        parts: dict[str, Step] = {}

        def show(step: Step) -> None:
            if step.phase not in tasks:
                tasks[step.phase] = bar.add_task(step.phase, total=step.total, phase=step.phase, state="")
            elif _begins(step, parts[step.phase]):
                bar.reset(tasks[step.phase], total=step.total)
            parts[step.phase] = step
            bar.update(tasks[step.phase], completed=step.done, total=step.total, state=_state(step))

        yield show


class _Lines:
    """Prints a step when its phase begins or ends, and else at most every few seconds."""

    def __init__(self) -> None:
        self.before: Step | None = None
        self.began, self.shown, self.first = 0.0, 0.0, 0.0

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if self.before is None or step.phase != self.before.phase or _begins(step, self.before):
            self.began, self.shown, self.first = now, -math.inf, step.done
        self.before = step
        if now - self.shown < LINE_EVERY and step.done < step.total:
            return
        self.shown = now
        share = step.done / step.total if step.total else 1.0
        line = f"{step.phase} {int(step.done)}/{step.total} {share:.0%} {_state(step)}".rstrip()
        if self.first < step.done < step.total:
            seconds = (now - self.began) / (step.done - self.first) * (step.total - step.done)
            line += f" ETA {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)


def _begins(step: Step, before: Step) -> bool:
    """Whether another part of the same phase begins, which has a pace of its own."""
    return step.total != before.total or step.done < before.done


def _state(step: Step) -> str:
    loss = "" if step.loss is None else f" loss {step.loss:.4g}"
    return f"{step.detail}{loss}".strip()
