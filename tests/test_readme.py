"""Every command, option, file and call that the documentation shows exists."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import apiq
from apiq.cli import app
from apiq.overrides import override, read_yaml
from apiq.params import parse

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]


def blocks(language):
    """(name of the page, content) of the fenced blocks in a language, on all pages."""
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.name, block


def commands():
    """(name of the page, words) of each command in the sh blocks; `a && b` and `a; b` are two."""
    for page, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word in ("&&", ";", "|"):
                    if words:
                        yield page, words
                    words = []
                else:
                    words.append(word)


COMMANDS = sorted({tuple(words): page for page, words in commands()}.items())
KNOWN = {"make", "apiq", "dvc", "prefect", "python", "bash"}
ELSEWHERE = {"git", "source", "pip", "pytest", "ruff", "pre-commit", "rm", "export", "cd"}


def shown(program):
    found = [words for words, _ in COMMANDS if words[0] == program]
    return pytest.mark.parametrize("words", found, ids=" ".join)


def test_commands_are_found_and_each_is_of_a_program_that_is_checked():
    assert {words[0] for words, _ in COMMANDS} >= KNOWN - {"bash"}
    assert {words[0] for words, _ in COMMANDS} <= KNOWN | ELSEWHERE


@shown("make")
def test_make_targets_exist(words):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words[1:] if "=" not in word} <= set(targets)


@shown("apiq")
def test_apiq_understands_its_commands(words):
    command = typer.main.get_command(app).commands[words[1]]
    context = command.make_context(words[1], list(words[2:]))  # parses and converts, runs nothing
    parse(override({}, context.params.get("settings") or []))


def test_profiles_that_are_shown_exist():
    named = {words[2] for words, _ in COMMANDS if words[:2] == ("apiq", "profile") and len(words) > 2}
    assert named
    assert all((ROOT / "params" / f"{name}.yaml").is_file() for name in named if not name.endswith(".yaml"))


@shown("dvc")
def test_dvc_understands_its_commands(words):
    from dvc.cli.parser import get_main_parser

    arguments = get_main_parser().parse_args(list(words[1:]))
    parse(override(read_yaml(ROOT / "params.yaml"), getattr(arguments, "set_param", None) or []))


@shown("python")
def test_modules_that_are_started_exist(words):
    assert words[1] == "-m"
    assert importlib.util.find_spec(words[2]) is not None
    if words[2] == "flows.full":
        parse(override(read_yaml(ROOT / "params.yaml"), words[3:]))


@shown("prefect")
def test_prefect_understands_its_commands(words):
    from prefect.cli._app import _app  # `prefect.cli.app` parses and runs

    _, arguments, _ = _app.parse_args(words[1:], exit_on_error=False, print_error=False)
    for parameter in arguments.arguments.get("params", []):
        name, _, value = parameter.partition("=")
        changes = json.loads(value)
        if name == "file":
            assert (ROOT / changes).is_file()
            continue
        assert name == "params"
        parse(override(read_yaml(ROOT / "params.yaml"), [f"{key}={value}" for key, value in changes.items()]))


@pytest.mark.parametrize("name", ["full", "sweep"])
def test_the_deployment_is_declared(name):
    (deployment,) = (each for each in read_yaml(ROOT / "prefect.yaml")["deployments"] if each["name"] == name)
    file, _, function = deployment["entrypoint"].partition(":")
    assert re.search(rf'@flow\(name="apiq"\)\ndef {function}\(', (ROOT / file).read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    committed = r"`((?:apiq|stages|flows|ci|tests|params|benchmarks|docs)/[\w./-]*)`"
    for name in re.findall(committed, text):
        if "my_method" not in name and name not in ("apiq/full", "apiq/sweep"):  # deployments
            assert (ROOT / name).exists(), name


def test_python_blocks_compile_and_calls_exist():
    for _, block in blocks("python"):
        ast.parse(block)
    for page in PAGES:
        for name in re.findall(r"`apiq\.([a-z]+)`", page.read_text()):
            assert name in apiq.__all__ or importlib.util.find_spec(f"apiq.{name}"), name
