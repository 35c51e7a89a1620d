"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    name: str
    """What was looked at."""
    status: Status
    """ok; warning: works, but slower or not everywhere; problem: will fail."""
    found: str
    """What is there."""
    fix: str | None = None
    """What to do about it."""
