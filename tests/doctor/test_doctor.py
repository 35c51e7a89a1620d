"""Each check on what it may find, and the whole on this machine."""

import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from apiq.doctor import hardware, hub, leftovers, repository, software

REQUIREMENTS = [
    "torch<2.14,>=2.13", "rich<16,>=15", "gone>=1", 'old>=2; extra == "pipeline"', 'missing>=1; extra == "eval"',
    'apiq[eval]; extra == "pipeline"', 'elsewhere>=1; sys_platform == "nowhere"',
]  # fmt: skip


def test_packages_against_their_bounds():
    versions = {"torch": "2.13.1+cpu", "rich": "14.9", "old": "1.0"}
    found = {finding.name: finding for finding in software.packages(REQUIREMENTS, versions.get)}
    assert found["packages"].found == "1 within their bounds"
    assert found["package rich"].status == "problem"
    assert found["package rich"].fix == "pip install 'rich<16,>=15'"
    assert found["package gone"].found.startswith("is not installed")
    assert found["package old"].status == "warning"  # only who runs the pipeline needs it
    assert "eval" in found["extras"].found
    assert "package elsewhere" not in found
    assert len(found) == 5


@pytest.mark.parametrize(("version", "status"), [("3.10.9", "problem"), ("3.11.0", "ok"), ("3.13.0rc1", "ok")])
def test_python_against_its_bound(version, status):
    assert software.python(version, ">=3.11").status == status


def test_this_environment_is_within_its_bounds():
    assert [finding.name for finding in software.check() if finding.status == "problem"] == []


@pytest.mark.parametrize(
    ("cuda", "available", "driver", "status"),
    [("12.8", True, True, "ok"), ("12.8", False, True, "warning"), (None, False, True, "warning"),
     (None, False, False, "ok")],
)  # fmt: skip
def test_the_build_of_torch_against_the_gpu(cuda, available, driver, status):
    finding = hardware.build("2.13.0", cuda, available, driver)
    assert finding.status == status
    assert (finding.fix is None) == (status == "ok")


@pytest.mark.parametrize(
    ("half", "auto", "found", "fix"),
    [
        (310e9, torch.bfloat16, "native, 5.5 times as fast", None),
        (310e9, torch.float32, "5.5 times as fast, though it does not count as native", "try quantize.dtype bfloat16"),
        (2e9, torch.bfloat16, "slower here, but auto takes it", "set quantize.dtype to float32"),
        (2e9, torch.float32, "not native here", "leave quantize.dtype at auto or float32"),
    ],
)
def test_the_advice_on_bfloat16_fits_what_auto_takes(half, auto, found, fix):
    finding = hardware.precisions(56e9, half, "cuda", auto)
    assert finding.found.startswith(found)
    assert finding.fix == fix
    assert finding.status == ("ok" if fix is None else "warning")


@pytest.mark.parametrize("able", [True, False])
def test_the_doctor_asks_what_auto_takes(monkeypatch, tmp_path, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype, device: 1e9)
    finding = next(each for each in hardware.check(tmp_path) if each.name == "bfloat16")
    assert finding.found.startswith("slower here" if able else "not native here")


def test_a_rate_is_measured():
    assert hardware.matmul_rate(torch.float32, torch.device("cpu"), seconds=0.05) > 1e8


@pytest.mark.parametrize(("free", "status"), [(10**11, "ok"), (10**10, "warning"), (10**8, "problem")])
def test_room_on_disk(free, status, tmp_path):
    finding = hardware.disk("unfinished work", tmp_path, free)
    assert finding.status == status
    assert (finding.fix or "APIQ_WORK").count("APIQ_WORK") == 1


def test_the_hub_switched_off_or_out_of_reach(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.access("http://127.0.0.1:9", offline=True).found == "switched off by HF_HUB_OFFLINE"
    unreachable = hub.access("http://127.0.0.1:9", offline=False)
    assert unreachable.status == "warning"
    assert "cannot be reached" in unreachable.found


def git(folder, *arguments):
    subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)


def test_git_without_a_repository_clean_and_changed(tmp_path):
    def found():
        return next(iter(repository.check(tmp_path)))

    assert found().found == "no repository here"
    git(tmp_path, "init")
    assert (found().status, found().found) == ("ok", "a clean repository")
    (tmp_path / "new").write_text("")
    assert found().found == "1 files differ from the last commit"


@pytest.mark.parametrize(
    ("told", "what", "remedy"),
    [
        ("fatal: detected dubious ownership in repository at '/x'", "it belongs to another user", "safe.directory /x"),
        ("fatal: not a git repository (or any parent)", "no repository here", "work in a clone, or git init"),
        ("\nerror: bad index\nmore", "error: bad index", "see git status"),
        ("", "git says nothing", "see git status"),
    ],
)
def test_what_git_tells_of_a_repository(told, what, remedy):
    found = repository.trouble(told, Path("/x"))
    assert found[0] == what and found[1].endswith(remedy)


def test_dvc_not_initialised_broken_and_up_to_date(tmp_path):
    pytest.importorskip("dvc")
    git(tmp_path, "init")
    *_, finding = repository.check(tmp_path)
    assert finding.found == "not initialised here"
    (tmp_path / ".dvc").mkdir()
    *_, finding = repository.check(tmp_path)
    assert finding.status == "ok", finding
    (tmp_path / "dvc.yaml").write_text("stages: [")
    *_, finding = repository.check(tmp_path)
    assert finding.status == "problem"
    assert finding.found.startswith("dvc status fails: ")


def test_stages_that_are_not_up_to_date():
    assert repository.status({}).status == "ok"
    changed = repository.status({"quantize": [{"changed deps": {}}], "report": []})
    assert changed.found == "not up to date: quantize, report"


def test_leftovers_and_their_age(tmp_path):
    assert leftovers.leftovers(tmp_path / "none", 0).status == "ok"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "block").write_bytes(b"0" * 5000)
    now = max(path.stat().st_mtime for path in (tmp_path / "run", tmp_path / "run" / "block"))
    finding = leftovers.leftovers(tmp_path, now + 2 * 86400)
    assert finding.status == "warning"
    assert finding.found.startswith("1 runs with ")
    assert finding.found.endswith("2.0 days old")


def test_places_that_are_not_there_yet_are_measured_where_they_will_be(tmp_path):
    from apiq.planning.machine import same_disk, standing

    assert standing(tmp_path / "a" / "b") == Path(tmp_path)
    assert same_disk(tmp_path / "a", tmp_path / "b")
