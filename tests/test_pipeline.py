"""dvc.yaml as it is declared: what depends on what, what is kept, and what a change reruns."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from apiq.overrides import read_yaml
from apiq.params import Params

ROOT = Path(__file__).parents[1]
PIPELINE = read_yaml(ROOT / "dvc.yaml")
STAGES = PIPELINE["stages"]
OUT = {
    "model": "data/model",
    "calibration": "data/calibration",
    "quantize": "data/quantized",
    "refine": "data/refined",
    "finetune": "data/finetuned",
    "evaluate": "data/evaluation",
    "report": "data/report",
}


def test_stages_are_the_scripts_and_the_sections() -> None:
    assert list(STAGES) == list(OUT) == list(Params.model_fields)
    scripts = {path.stem for path in (ROOT / "stages").glob("[!_]*.py")}
    assert scripts == set(STAGES)
    for name, stage in STAGES.items():
        assert f"-m stages.{name}" in stage["cmd"]
        assert stage["deps"][0] == f"stages/{name}.py"
        assert name in stage["params"]


@pytest.mark.parametrize("name", OUT)
def test_outs_are_a_folder_and_its_cost_and_dvc_may_take_them_from_its_cache(name: str) -> None:
    assert STAGES[name]["outs"] == [OUT[name], f"data/timing/{name}.json"]


def test_the_readme_of_the_data_tells_of_every_out() -> None:
    told = (ROOT / "data/README.md").read_text()
    for name, folder in OUT.items():
        assert f"| `{folder.removeprefix('data/')}/` | `{name}` |" in told
    for name in ("metrics.json", "tracking/", "timing/"):
        assert f"| `{name}` |" in told


@pytest.mark.parametrize("name", OUT)
def test_code_that_a_stage_depends_on_is_there(name: str) -> None:
    missing = [path for path in STAGES[name]["deps"] if not path.startswith("data/") and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("name", OUT)
def test_a_stage_depends_on_what_its_script_imports(name: str) -> None:
    shared = {"apiq.params", "apiq.progress", "apiq.files", "apiq.errors", "apiq.work"}
    shared |= {"apiq.models.source", "apiq.calibration.store", "apiq.checkpoint.loading"}  # they hand on what outs hold
    tree = ast.parse((ROOT / "stages" / f"{name}.py").read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("apiq")
    ]
    for node in imports:
        modules = {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        paths = {Path(*module.split(".")).as_posix() for module in modules}
        covered = any(
            path == dep.removesuffix(".py") or path.startswith(f"{dep}/")
            for path in paths
            for dep in STAGES[name]["deps"]
        )
        assert covered or node.module in shared, f"{name} imports {node.module}"


@pytest.mark.parametrize("name", ["model", "finetune", "evaluate"])
@pytest.mark.parametrize("module", ["apiq.randomness", "apiq.evaluation.perplexity", "apiq.evaluation.run"])
def test_a_stage_depends_on_what_decides_its_result_a_step_further(name: str, module: str) -> None:
    deps = [ROOT / dep for dep in STAGES[name]["deps"] if dep.startswith("apiq/")]
    files = [file for dep in deps for file in (dep.rglob("*.py") if dep.is_dir() else [dep])]
    imported = any(f"from {module} import" in file.read_text() for file in files)
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert not imported or path in files, f"{name} imports {module}"


def downstream(changed: str) -> set[str]:
    """The stages that a change of a path or of a section of params.yaml reruns."""
    rerun: set[str] = set()
    for name, stage in STAGES.items():
        after = {OUT[earlier] for earlier in rerun}
        touched = any(changed == dep or changed.startswith(f"{dep}/") for dep in stage["deps"])
        read = any(changed == param or changed.startswith(f"{param}.") for param in stage["params"])
        if touched or read or after & set(stage["deps"]):
            rerun.add(name)
    return rerun


@pytest.mark.parametrize(
    ("changed", "rerun"),
    [
        ("model.demo.steps", {*OUT}),
        ("calibration.seed", {"calibration", "quantize", "refine", "finetune", "evaluate", "report"}),
        ("quantize.bits", {"quantize", "refine", "finetune", "evaluate", "report"}),
        ("finetune.epochs", {"finetune", "evaluate", "report"}),
        ("evaluate.tasks", {"evaluate", "report"}),
        ("evaluate.perplexity.demo.length", {"calibration", "quantize", "refine", "finetune", "evaluate", "report"}),
        ("report.title", {"report"}),
        ("apiq/methods/apiq_bw.py", {"quantize", "refine", "finetune", "evaluate", "report"}),
        ("apiq/recipes.py", {"quantize", "refine", "finetune", "evaluate", "report"}),
        ("apiq/quantize_params.py", {"quantize", "refine", "finetune", "evaluate", "report"}),
        ("apiq/refine_params.py", {"refine", "finetune", "evaluate", "report"}),
        ("apiq/models/demo.py", {*OUT}),
        ("apiq/reporting/page.py", {"report"}),
        ("apiq/evaluation/tasks.py", {"evaluate", "report"}),
        ("data/tasks/docs_word.yaml", {"evaluate", "report"}),
    ],
)
def test_a_change_reruns_what_depends_on_it_and_nothing_else(changed: str, rerun: set[str]) -> None:
    assert downstream(changed) == rerun


def test_git_ignores_what_the_stages_write_and_keeps_the_metrics() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    outs = [out for stage in STAGES.values() for out in stage["outs"]]
    done = subprocess.run(["git", "check-ignore", *outs, "data/metrics.json"], cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == set(outs)


@pytest.mark.slow
def test_dvc_reads_the_pipeline() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == list(OUT), done.stderr
