"""All checks in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apiq.doctor import hardware, hub, leftovers, repository, software
from apiq.doctor.finding import Finding


def examine(folder: str | Path = ".") -> Iterator[Finding]:
    """Check Python, packages, torch, the device, memory, disk, the hub, and git and DVC in `folder`, one by one.

    Takes a few seconds: the rate of matrix products is measured. Nothing is changed.
    """
    folder = Path(folder)
    yield from software.check()
    yield from hardware.check(folder)
    yield from hub.check()
    yield from repository.check(folder)
    yield from leftovers.check()
