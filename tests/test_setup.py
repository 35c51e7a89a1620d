"""The lock, the declared bounds and the make targets agree with each other and with the code."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}


def requirements(*extras):
    """What pyproject.toml asks for, with that of the extras that these extras name."""
    found = []
    for extra in extras:
        for requirement in map(
            Requirement, PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
        ):
            found += requirements(*requirement.extras) if requirement.name == "apiq" else [requirement]
    return found


ALL = requirements("", *PROJECT["optional-dependencies"])


def imports(folder):
    """(file, top-level name) of each absolute import in a folder of modules."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            yield from ((str(path.relative_to(ROOT)), name) for name in names)


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_every_requirement_has_bounds_on_both_sides_and_the_lock_is_within(requirement):
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {"=="} or operators == {">=", "<"}
    (pin,) = LOCK[canonicalize_name(requirement.name)].specifier
    assert requirement.specifier.contains(pin.version)


def test_the_lock_pins_every_version_and_leaves_the_build_of_torch_open():
    for pin in LOCK.values():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version
    assert str(LOCK["torch"]) == "torch==2.13.0"
    assert not [name for name in LOCK if re.match("nvidia|cuda", name)]


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("apiq", ["", "eval", "exports", "kernels", "tracking"]),
        ("stages", ["", "pipeline"]),
        ("flows", ["", "flows"]),
        ("ci", [""]),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    declared = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    ours = {"apiq", "stages", "flows", "ci"}
    distributions = packages_distributions()
    for file, name in imports(folder):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ours:
            assert declared & set(map(canonicalize_name, distributions.get(top, [top]))), f"{file} imports {top}"


FLOORS = {
    "apiq": {"stages", "flows", "ci", "dvc", "prefect"},
    "apiq/grids": {"apiq.blocks", "apiq.methods", "apiq.checkpoint", "apiq.finetuning", "apiq.evaluation"},
    "apiq/layers": {"apiq.blocks", "apiq.methods", "apiq.checkpoint", "apiq.finetuning", "apiq.evaluation"},
    "apiq/blocks": {"apiq.methods"},
    "stages": {"flows", "ci", "prefect"},
}


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_go_downwards_only(folder):
    upwards = [
        (file, name)
        for file, name in imports(folder)
        for above in FLOORS[folder]
        if name == above or name.startswith(f"{above}.")
    ]
    assert upwards == []


@pytest.mark.parametrize("module", ["transformers.modeling_utils", "peft", "datasets.arrow_dataset", "apiq.cli"])
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecation_upstream_is_an_error(module, category):
    with pytest.raises(category, match="old"):
        warnings.warn_explicit("old", category, "file.py", 1, module=module)


def test_a_deprecation_elsewhere_is_not():
    with pytest.warns(FutureWarning, match="old"):
        warnings.warn_explicit("old", FutureWarning, "file.py", 1, module="mytransformers")


def make(folder, *arguments):
    """`make` as somebody types it, also where the tests themselves were started by make."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=own, capture_output=True, text=True, check=False)


def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    shown = make(ROOT).stdout
    assert [line.split()[1] for line in shown.splitlines()] == targets


@pytest.mark.parametrize("version", ["older", "absent"])
def test_without_python_3_11_make_says_one_sentence_and_leaves_nothing(tmp_path, version):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "older").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "older").chmod(0o755)
    done = make(tmp_path, "demo", f"PYTHON=./{version}")
    assert done.returncode != 0
    sentence, _ = done.stderr.splitlines()  # the second line is make's own
    assert "Python 3.11 or newer" in sentence
    assert not (tmp_path / ".venv").exists()
