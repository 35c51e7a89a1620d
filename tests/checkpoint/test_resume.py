"""A walk that was stopped goes on, and ends in the same bytes."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch

from apiq import quantization
from apiq.blocks import walk
from apiq.errors import ApiqError
from apiq.memory import OutOfMemory
from apiq.methods.apiq_bw import ApiqBlockwise


class Stopped(Exception):
    pass


def stop_at(share):
    def progress(step):
        if step.phase == "quantize" and step.done >= share:
            raise Stopped

    return progress


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("settings", [{"method": "rtn"}, {"method": "apiq-lw"}, {}, {"lr_weight": 0.01}])
def test_resumed_equals_uninterrupted_bit_for_bit(make, work, settings):
    settings = {"method": "apiq-bw", "epochs": 2, **settings}
    whole, _ = make("whole", **settings)
    with pytest.raises(Stopped):
        make("stopped", **settings, progress=stop_at(1.0 if settings["method"] == "rtn" else 1.2))
    assert len(list(work.iterdir())) == 1
    steps = []
    resumed, _ = make("stopped", **settings, progress=steps.append)
    assert min(step.done for step in steps) >= 1
    assert content(resumed) == content(whole)
    assert not list(work.iterdir())


def test_a_stopped_walk_leaves_nothing_in_the_output(make, tmp_path):
    with pytest.raises(Stopped):
        make("stopped", progress=stop_at(1.2))
    assert not list(tmp_path.glob("*stopped*"))


def test_work_begun_in_another_precision_is_not_gone_on_with(make, work, monkeypatch):
    """As on another node, where `auto` stands for another one."""
    whole, _ = make("whole")
    with monkeypatch.context() as elsewhere, pytest.raises(Stopped):
        elsewhere.setattr(quantization, "solver_dtype", lambda *_: torch.bfloat16)
        make("stopped", progress=stop_at(1.2))
    again, _ = make("stopped")
    assert content(again) == content(whole)
    assert len(list(work.iterdir())) == 1


def test_other_parameters_begin_anew(make, work):
    with pytest.raises(Stopped):
        make("stopped", progress=stop_at(1.2))
    steps = []
    make("stopped", bits=3, progress=steps.append)
    assert min(step.done for step in steps) < 1
    assert len(list(work.iterdir())) == 1  # the first one is still waiting


@pytest.mark.parametrize("name", ["activations-001", "block-000", "adapter-000", "state"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_work_is_refused_with_what_to_do(make, work, name, damage):
    with pytest.raises(Stopped):
        make("stopped", progress=stop_at(1.2))
    (path,) = work.glob(f"*/{name}.*")
    path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -50])
    if damage == "missing":
        path.unlink()
    if (name, damage) == ("state", "missing"):
        make("stopped")  # without it nothing is finished
        return
    with pytest.raises(ApiqError, match=r"is damaged \(.*\); delete it and start again"):
        make("stopped")


def test_a_kill_while_finished_work_is_removed_leaves_none_to_go_on_with(make, work, monkeypatch):
    remove = shutil.rmtree

    def killed(path, *arguments, **options):
        if not (Path(path) / "state.json").exists():
            return remove(path, *arguments, **options)
        (Path(path) / "adapter-000.safetensors").unlink()
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(Stopped):
            make("whole")
    assert list(work.iterdir())
    steps = []
    make("whole", progress=steps.append)
    assert min(step.done for step in steps) < 1
    assert not list(work.iterdir())


def test_the_old_output_stays_until_the_new_one_stands(make):
    old, _ = make("kept", bits=4)
    before = content(old)
    with pytest.raises(Stopped):
        make("kept", bits=3, progress=stop_at(1.2))
    assert content(old) == before
    make("kept", bits=3)
    assert content(old) != before


@pytest.mark.parametrize("error", [OutOfMemory, torch.OutOfMemoryError])
def test_when_one_window_does_not_fit_the_activations_leave_the_device_and_the_block_is_done_again(
    make, monkeypatch, error
):
    """On a stand-in for a GPU: the walk cannot tell a device that says it is one."""
    whole, _ = make("whole")
    homes, solve, first = [], ApiqBlockwise.solve, []

    def short_of_memory(self, problem):
        homes.append(problem.X.home.kind)
        if homes[-1] == "device":
            held = problem, problem.block, problem.X.rows, problem.Xq.rows, problem.targets.rows
            first[:] = [weakref.ref(each) for each in held]
            raise error("no memory for a single window")
        assert [each() for each in first] == [None] * len(first)  # the first try left the device
        return solve(self, problem)

    monkeypatch.setattr(ApiqBlockwise, "solve", short_of_memory)
    with pytest.raises(error):
        make("short")  # on a CPU there is nowhere to move to
    assert homes == ["device"]
    monkeypatch.setattr(walk, "movable", lambda X: X is not None and X.home.kind == "device")
    again, _ = make("again")
    assert homes[1:] == ["device", "memory", "memory"]
    assert content(again) == content(whole)
