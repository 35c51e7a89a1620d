"""A scratch repository with the real dvc.yaml and params.yaml, whose stages only pretend."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("model", "calibration", "quantize", "refine", "finetune", "evaluate", "report")
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")


def code_dependencies(pipeline: str) -> list[str]:
    lines = (line.strip().removeprefix("- ") for line in pipeline.splitlines() if line.strip().startswith("- "))
    return [line for line in lines if line.startswith("apiq/")] + ["data/tasks"]


def build(folder: Path) -> Path:
    """A committed git and DVC repository in `folder`."""
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "data/.gitignore", "data/sweeps/README.md"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "stages").mkdir()
    (folder / "stages" / "__init__.py").touch()  # else an installed package of that name is found first
    for stage in STAGES:
        shutil.copy(Path(__file__).parent / "stand_in.py", folder / "stages" / f"{stage}.py")
    for path in map(folder.joinpath, code_dependencies((ROOT / "dvc.yaml").read_text())):
        source = path if path.suffix else path / "code.txt"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("code\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "A pipeline of stand-ins"]):
        subprocess.run([*GIT, *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """A Prefect server of the tests' own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scratch repository as the current directory, with this Python first on the path."""
    build(tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    return tmp_path / "repository"
