"""The commands: one JSON object on stdout, one sentence and status 1 when refused."""

import json
import random

import pytest

from apiq.cli import main
from apiq.files import read_json


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run the command; its exit status, stdout and stderr."""
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["apiq", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        seen = capfd.readouterr()
        return status, seen.out, seen.err

    return run


@pytest.fixture
def text(tmp_path):
    dice = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(f"w{dice.randrange(3, 61)}" for _ in range(200)))
    return tmp_path / "text.txt"


def test_export_prints_one_json_object(command, checkpoint, tmp_path):
    folder = checkpoint(method="apiq-bw", bits=2)
    status, out, err = command("export", folder, "--format", "compressed-tensors", "--out", tmp_path / "out", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert (result["format"], result["dtype"], result["linears"]) == ("compressed-tensors", "float32", 14)
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_refusal_is_one_line_and_status_1(command, checkpoint, tmp_path):
    status, out, err = command("export", checkpoint(bits=4), "--format", "gptq", "--out", tmp_path / "out")
    assert status == 1 and not out
    assert err.strip().splitlines()[-1].startswith("apiq: GPTQ v1 stores zero points less 1")


def test_merge_dense_and_back_into_few_bits(command, checkpoint, text, tmp_path):
    folder = checkpoint(method="apiq-bw", bits=2)
    status, out, err = command("merge", folder, "--out", tmp_path / "dense", "--dtype", "float16", "--json")
    assert status == 0 and json.loads(out)["dtype"] == "float16", err
    form = ("merge", folder, "--out", tmp_path / "again", "--requantize", "rtn")
    assert command(*form)[0] == 2  # without --text nothing tells what it costs
    status, out, err = command(*form, "--text", text, "--length", 16, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["perplexity_after"] != result["perplexity_before"] > 1
    assert read_json(tmp_path / "again/apiq.json")["method"] == "rtn"


@pytest.mark.parametrize("wrong", [("--length", 0), ("--length", 1), ("--windows", -1)])
def test_windows_that_are_none_are_wrong_usage(command, checkpoint, text, tmp_path, wrong):
    form = ("merge", checkpoint(method="apiq-bw", bits=2), "--out", tmp_path / "again", "--requantize", "rtn")
    status, _, err = command(*form, "--text", text, *wrong)
    assert status == 2 and wrong[0] in err


def test_the_calibration_of_requantizing_is_set_by_its_keys(command, checkpoint, text, tmp_path):
    folder = checkpoint(method="apiq-bw", bits=2)
    form = ("merge", folder, "--out", tmp_path / "again", "--requantize", "gptq", "--text", text, "--length", 16)
    drawn = ("--calibration", text, "-S", "calibration.length=24", "-S", "calibration.windows=5")
    status, _, err = command(*form, *drawn, "--json")
    assert status == 0, err
    assert read_json(tmp_path / "again/apiq.json")["calibration"] == {"windows": 5, "length": 24}
    assert command(*form, *drawn, "-S", "quantize.bits=3")[0] == command(*form, *drawn[2:])[0] == 2
    assert command(*form[:4], *drawn)[0] == 2  # nothing is quantized, so nothing is calibrated


def test_calibration_that_does_not_fit_is_refused_before_the_work(command, checkpoint, text, tmp_path):
    form = ("merge", checkpoint(method="apiq-bw", bits=2), "--out", tmp_path / "again", "--requantize", "gptq")
    long = ("--calibration", text, "-S", "calibration.length=65", "-S", "calibration.windows=1")
    status, _, err = command(*form, "--text", text, "--length", 16, *long)
    assert status == 1 and "calibration.length is 65; it must be at most 64, the context of the model" in err
    assert "perplexity" not in err and not (tmp_path / "work").exists()
    status, _, err = command(*form, "--text", text, "--length", 65, *long)
    assert status == 1 and "the windows have 65 tokens" in err and not (tmp_path / "work").exists()


def test_merge_into_zeros(command, checkpoint, tmp_path):
    folder = checkpoint(method="gptq-lora", bits=2, pooled=True)
    form = ("merge", folder, "--out", tmp_path / "out", "--into", "zeros")
    assert command(*form, "--dtype", "float16")[0] == command(*form, "--requantize", "rtn")[0] == 2
    status, out, err = command(*form, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["linears"] == 14 and result["bits"]["adapters"] == 0
    assert not (tmp_path / "out/adapter").exists()


def test_push_offline_is_refused_in_one_line(command, checkpoint):
    status, _, err = command("push", checkpoint(bits=4), "me/tiny")
    assert status == 1 and "apiq: me/tiny cannot be written on the hub" in err


@pytest.mark.parametrize("name", ["export", "merge", "push"])
def test_help_has_an_example(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0 and f"apiq {name} ./my-model" in out
