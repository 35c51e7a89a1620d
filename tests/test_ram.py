"""The free RAM of a container, from the files of its control groups."""

from types import SimpleNamespace

import psutil
import pytest

from apiq import ram
from apiq.ram import Bound, bounds, free_ram, whole_ram

SECOND = ("memory.max", "memory.current", "inactive_file")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture
def system(tmp_path):
    """Write the groups of a process and the files of each group, (limit, usage, cached files) by folder."""

    def write(groups, folders, names):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for folder, values in folders.items():
            place = tmp_path / "sys/fs/cgroup" / folder
            place.mkdir(parents=True, exist_ok=True)
            for name, value in zip(names[:2], values, strict=False):
                (place / name).write_text(f"{value}\n")
            if len(values) > 2:
                (place / "memory.stat").write_text(f"anon 1\n{names[2]} {values[2]}\nslab 2\n")
        return tmp_path

    return write


def test_a_group_and_those_around_it(system):
    folders = {"pod/one": ("max", 5, 1), "pod": (100, 60, 20), "other": (7, 7, 0), "": (1000, 90)}
    assert list(bounds(system("0::/pod/one\n", folders, SECOND))) == [Bound(100, 40), Bound(1000, 90)]


def test_the_first_version_of_control_groups(system):
    folders = {"memory/docker/a": (300, 200, 50), "memory": (2**63 - 4096, 900, 1)}
    root = system("5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n", folders, FIRST)
    assert list(bounds(root)) == [Bound(300, 150), Bound(2**63 - 4096, 899)]


@pytest.mark.parametrize("group", ["/docker/a", "/../../docker/a", "/"])
def test_a_container_that_sees_its_own_group_as_the_root(system, group):
    assert list(bounds(system(f"0::{group}\n", {"": (300, 200, 50)}, SECOND))) == [Bound(300, 150)]


def test_missing_files_are_no_bound(system, tmp_path):
    assert list(bounds(tmp_path)) == []
    assert list(bounds(system("0::/a\n", {"a": (), "": (100,)}, SECOND))) == []


@pytest.mark.parametrize(
    ("found", "free", "whole"),
    [([], 600, 1000), ([Bound(500, 100)], 400, 500), ([Bound(5000, 10), Bound(700, 650)], 50, 700),
     ([Bound(500, 501)], 0, 500)],
)  # fmt: skip
def test_what_can_be_had_is_the_least_of_all(monkeypatch, found, free, whole):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=600, total=1000))
    monkeypatch.setattr(ram, "bounds", lambda root: found)
    assert (free_ram(), whole_ram()) == (free, whole)
