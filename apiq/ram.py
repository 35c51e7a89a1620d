"""How much RAM can be had: what the machine has, and no more than the container may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Bound:
    """What a control group may take; bytes."""

    limit: int
    used: int
    """Without the cached files that the kernel would drop first."""


def free_ram() -> int:
    """Bytes that can be had without swapping, and without being killed for the limit of a container."""
    rooms = [max(bound.limit - bound.used, 0) for bound in bounds(Path("/"))]
    return min([psutil.virtual_memory().available, *rooms])


def whole_ram() -> int:
    """Bytes of the machine, or of the smallest container around this process."""
    return min([psutil.virtual_memory().total, *(bound.limit for bound in bounds(Path("/")))])


def bounds(root: Path) -> Iterator[Bound]:
    """The bounds on the control group of this process and on those around it.

    Files that are not there, as on other systems and above the group of a container, and `max` mean no bound.

    Args:
        root: the folder that `proc` and `sys` lie in.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        inside = os.path.normpath(path).lstrip("/")  # a namespace tells groups outside of it as /../other
        if not controllers:
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield from _upwards(root / mount, inside, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _upwards(root / "sys/fs/cgroup/memory", inside, names)


def _upwards(mount: Path, inside: str, names: tuple[str, str, str]) -> Iterator[Bound]:
    """The bounds on the group `inside` and all above it, by the names of the files and of the cached bytes."""
    group = mount / inside
    for folder in (group, *group.parents):
        limit, used = _text(folder / names[0]), _text(folder / names[1])
        if limit is not None and used is not None and limit != "max":
            statistics = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
            yield Bound(int(limit), int(used) - int(statistics.get(names[2], 0)))
        if folder == mount:
            return


def _text(path: Path) -> str | None:
    """What stands in a file, or None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
