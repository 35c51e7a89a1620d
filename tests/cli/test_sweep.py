"""The command `apiq sweep` as far as it goes without running cells."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from apiq.cli import main
from apiq.errors import ApiqError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def apiq(monkeypatch, capfd, tmp_path):
    """Run the command beside params.yaml; its exit status, stdout and stderr."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["apiq", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as leaving:
            status = leaving.code or 0
        seen = capfd.readouterr()
        return status, seen.out, seen.err

    return run


FILE = ROOT / "experiments" / "below-two-bits.yaml"


def test_cells_are_listed_and_none_is_run(apiq, tmp_path):
    status, out, _ = apiq("sweep", FILE, "--list")
    assert status == 0
    assert "below-two-bits-1-32-apiq-bw" in out and "refused: NormalFloat has 2 to 4 bits" in out
    told = json.loads(apiq("sweep", FILE, "--list", "--json")[1])
    assert len(told["cells"]) == 66
    assert sum(cell["refused"] is not None for cell in told["cells"]) == 10
    assert not (tmp_path / "data" / "sweeps").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("gone.yaml",), "there is no file gone.yaml."),
        ((FILE, "--profile", "gpt"), "has no profile gpt; it has llama2-7b."),
        ((FILE, "-S", "quantize.ranks=3"), "quantize.ranks is not a parameter; did you mean rank?"),
        ((FILE, "--text", "gone.txt"), "evaluate.perplexity.text.text is 'gone.txt'; it should be a"),
    ],
)
def test_a_refusal_is_one_sentence_before_anything_runs(apiq, arguments, sentence):
    status, out, err = apiq("sweep", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("apiq: ") and sentence in err and err.count("\n") == 1


def test_without_prefect_it_says_what_to_install(apiq, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name}", name="prefect")

    monkeypatch.setattr("apiq.cli_sweep.importlib", SimpleNamespace(import_module=missing))
    status, _, err = apiq("sweep", FILE)
    assert status == 1
    assert "apiq sweep needs prefect, which is not here; clone the repository, run pip install -e '.[flows]'" in err


@pytest.mark.parametrize("writes", [True, False])
def test_the_table_of_an_earlier_run_is_not_shown_for_a_run_that_wrote_none(apiq, monkeypatch, tmp_path, writes):
    folder = tmp_path / "data/sweeps/below-two-bits"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text("old")

    def run_here(*_):
        if writes:
            (folder / "table.md").write_text("new")
        return SimpleNamespace(is_completed=lambda: False, message="It failed")

    flow = SimpleNamespace(run_here=run_here, ROOT=Path.cwd())
    monkeypatch.setattr("apiq.cli_sweep.importlib", SimpleNamespace(import_module=lambda name: flow))
    status, out, err = apiq("sweep", FILE)
    assert (status, out.strip()) == (1, "new" if writes else "")
    assert "It failed." in err


def test_a_sweep_is_started_in_the_repository_of_its_flow(apiq, monkeypatch):
    flow = SimpleNamespace(run_here=pytest.fail, ROOT=Path("/elsewhere"))
    monkeypatch.setattr("apiq.cli_sweep.importlib", SimpleNamespace(import_module=lambda name: flow))
    status, _, err = apiq("sweep", FILE)
    assert status == 1 and "start it in /elsewhere, not in" in err


@pytest.mark.parametrize(("runner", "package"), [("dask", "prefect-dask"), ("ray", "prefect-ray")])
def test_a_runner_that_is_not_installed_is_named(runner, package):
    from flows.sweep import task_runner

    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        ApiqError, match=rf"runner is {runner}, for which .* run `pip install {package}`, or take threads"
    ):
        task_runner(runner, 2)


def test_help_teaches(apiq):
    status, out, _ = apiq("sweep", "--help")
    assert status == 0
    assert "--list" in out and "--jobs" in out and "Example:" in out
