"""`apiq plan` and `apiq doctor` as they are typed."""

import json

import pytest
from transformers import LlamaConfig

from apiq.cli import app, main
from apiq.doctor import examine
from apiq.doctor.finding import Finding

PARAMS = """
calibration: {windows: 4, length: 16}
quantize: {rank: 4, group_size: 16, bits: 2, device: cpu}  # kept
finetune: {length: 16, batch_size: 2, device: cpu}
evaluate: {perplexity: {demo: {text: demo, length: 16}}}
"""


@pytest.fixture
def apiq(monkeypatch, capfd, tmp_path):
    """Run the command in a folder with a profile; its exit status, stdout and stderr."""
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "params" / "four.yaml").write_text("# Four bits\nquantize: {bits: 4}\n")
    LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    ).save_pretrained(tmp_path / "outline")  # fmt: skip

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


def test_a_profile_is_laid_over_without_writing(apiq, tmp_path):
    status, out, err = apiq("plan", "four", "--model", "outline", "--no-time", "--json")
    assert status == 0, err
    assert json.loads(out)["result"]["bits"]["codes"] == 4
    assert (tmp_path / "params.yaml").read_text() == PARAMS
    _, out, _ = apiq("plan", "--model", "outline", "--no-time", "--json", "-S", "quantize.bits=3")
    assert json.loads(out)["result"]["bits"]["codes"] == pytest.approx(3, rel=0.4)  # rows fill whole words


def test_profiles_are_listed_a_line_each(apiq, tmp_path):
    (tmp_path / "params" / "even_three.yaml").write_text("# Three [bits]\nquantize: {bits: 3}\n")
    assert apiq("profile")[1] == "even_three  Three [bits]\nfour        Four bits\n"
    assert json.loads(apiq("profile", "--json")[1]) == {"profiles": {"even_three": "Three [bits]", "four": "Four bits"}}


def test_the_table_for_people(apiq):
    status, out, err = apiq("plan", "--model", "outline", "--no-time")
    assert status == 0, err
    for word in ("effective bits", "quantize: ram", "finetune: ram", "none: all of it fits this machine"):
        assert word in out


def test_without_params_yaml_the_defaults_are_planned(apiq, tmp_path):
    (tmp_path / "params.yaml").unlink()
    narrow = ("-S", "quantize.group_size=16")
    status, out, _ = apiq("plan", "--model", "outline", "--no-time", "--json", *SHORT, *narrow)
    assert status == 0
    assert json.loads(out)["result"]["bits"]["codes"] == 2


TEXT = "evaluate.perplexity.demo={text: demo, length: 16}"
SHORT = ("-S", "calibration.length=16", "-S", "finetune.length=16", "-S", "quantize.rank=4", "-S", TEXT)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--params", "nosuch.yaml"), "there is no file nosuch.yaml."),
        (("fuor",), "there is no profile fuor in params; did you mean four?"),
        (("--model", "owner/absent"), "config.json of owner/absent is neither in the cache nor to be had"),
        (("--model", "outline", "-S", "calibration.length=33"), "calibration.length is 33; it should be at most 32"),
        (("--model", "outline", "-S", "quantize.group_size=49"), "quantize.group_size is 49; it should be at most 48"),
        (
            ("--model", "outline", "-S", "evaluate.perplexity.demo.length=33"),
            "evaluate.perplexity.demo.length is 33; it should be at most 32, the context of the model",
        ),
    ],
)
def test_a_refusal_is_one_sentence_and_status_1(apiq, arguments, sentence):
    status, out, err = apiq("plan", *arguments, "--no-time", "--json")
    assert (status, out) == (1, "")
    assert sentence in err.strip().splitlines()[-1]


@pytest.mark.parametrize(("worst", "expected"), [("warning", 0), ("problem", 1)])
def test_the_doctor_fails_on_a_problem_only(apiq, monkeypatch, worst, expected):
    findings = [Finding("python", "ok", "3.11"), Finding("disk", worst, "little", "pip install 'apiq[pipeline]'")]
    monkeypatch.setattr(examine, "examine", lambda: iter(findings))
    status, out, _ = apiq("doctor")
    assert status == expected
    assert "disk: little -> pip install 'apiq[pipeline]'" in out
    status, out, _ = apiq("doctor", "--json")
    told = json.loads(out)
    assert status == expected
    assert told["problems"] == expected
    assert [check["status"] for check in told["checks"]] == ["ok", worst]


def test_the_doctor_on_this_machine(apiq):
    _, out, _ = apiq("doctor", "--json")
    names = [check["name"] for check in json.loads(out)["checks"]]
    assert {"python", "packages", "torch", "bfloat16", "compiler", "ram", "disk (here)", "hub", "git"} <= set(names)


@pytest.mark.parametrize("command", ["plan", "doctor"])
def test_help_teaches(apiq, command):
    status, out, _ = apiq(command, "--help")
    assert status == 0
    assert "--json" in out


def test_nothing_of_the_help_is_cut_at_80_columns(apiq, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in app.registered_commands:
        status, out, _ = apiq(command.callback.__name__, "--help")
        assert status == 0
        assert "\N{HORIZONTAL ELLIPSIS}" not in out, command.callback.__name__
