"""One stage of the pipeline as a command: what DVC made of it, and how far it is while it runs."""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from apiq.errors import ApiqError
from apiq.params import Params
from flows.processes import stream
from flows.workspace import dvc

STAGES = ("model", "calibration", "quantize", "refine", "finetune", "evaluate", "report")

_PROGRESS = re.compile(r"(?P<phase>\S.*?) (?P<done>\d+)/(?P<total>\d+) \d+%(?P<state>.*)")
_OUTCOMES = {"didn't change, skipping": "Unchanged", "is cached - skipping run": "Cached"}
_HINTS = re.compile(r"To track the changes|\s*git add |To enable auto staging|\s*dvc config core|Use `dvc push`")
_REFUSED = re.compile(r"exited with 2$")
"""What DVC tells of a stage that ended by an ApiqError."""
_OF_DVC = ("ERROR: failed to reproduce", "Running stage", "> ")


class StageRefused(ApiqError):
    """A stage ended with a sentence of its own, as it would again."""


def reproduce(stage: str, root: Path, on_line: Callable[[str], None], settings: Mapping[str, str] | None = None) -> str:
    """Bring one stage up to date and tell how: `Ran`, `Cached` (taken from DVC's run-cache) or `Unchanged`.

    `settings` are added to the environment of the stage.

    Raises:
        StageRefused: the stage refused what it was given; with its sentence.
        ApiqError: the stage failed; with the last line it wrote.
    """
    outcome, last = "Ran", deque[str](maxlen=20)

    def listen(line: str) -> None:
        nonlocal outcome
        outcome = next((name for sign, name in _OUTCOMES.items() if sign in line), outcome)
        if not _HINTS.match(line):
            last.append(line)
            on_line(line)

    status = stream(dvc("repro", "--single-item", stage), root, listen, environment() | dict(settings or {}))
    if status != 0:
        told = [line for line in last if not line.startswith(_OF_DVC)] or [*last] or [f"exit status {status}"]
        kind = StageRefused if any(_REFUSED.search(line) for line in last) else ApiqError
        raise kind(f"the stage {stage} failed: {told[-1]}")
    return outcome


def environment() -> dict[str, str]:
    """What a stage needs in its environment: this interpreter as `python`, and lines that come at once."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Mark:
    """How far a stage is, as one of its lines tells."""

    percent: float
    text: str


def read_progress(line: str) -> Mark | None:
    """The progress in a line such as `quantize 3/6 50% block 4/6 loss 0.0123 ETA 12 s`; None in any other."""
    found = _PROGRESS.fullmatch(line.strip())
    if found is None or int(found["total"]) == 0:
        return None
    share = min(1.0, int(found["done"]) / int(found["total"]))
    return Mark(round(100 * share, 1), f"{found['phase']} {found['done']}/{found['total']}{found['state']}")


def gpu_slot(stage: str, params: Params) -> str | None:
    """The concurrency limit that a stage occupies: `gpuN` for the device it computes on; None for a CPU."""
    device = getattr(getattr(params, stage), "device", "cpu")
    if device == "auto":
        from apiq.device import pick_device  # imports torch

        device = str(pick_device(device))
    if device in ("cpu", "mps"):
        return None
    return f"gpu{device.partition(':')[2] or 0}"
