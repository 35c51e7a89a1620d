"""The progress artifact of a stage or sweep on Prefect's pages."""

from __future__ import annotations

from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.pipeline import read_progress


class Board:
    """There from the first line that tells progress."""

    def __init__(self, name: str) -> None:
        self.name, self.artifact = name, None

    def show(self, line: str) -> None:
        """Take note of a line of output."""
        mark = read_progress(line)
        if mark is None:
            return
        if self.artifact is None:
            made = create_progress_artifact(mark.percent, key=f"progress-{self.name}", description=mark.text)
            self.artifact = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self.artifact, mark.percent, description=mark.text)
