"""The command line: its fixed forms, its JSON, its exit statuses."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import apiq as package
from apiq.cli import main

WORDS = 61


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rows = (" ".join(f"w{dice.randrange(3, WORDS)}" for _ in range(40)) for _ in range(20))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def apiq(monkeypatch, capfd, tmp_path):
    """Run the command; its exit status, stdout and stderr."""
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
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


SMALL = ("--bits", 2, "--group-size", 16, "--rank", 4, "--windows", 4, "--length", 16, "--epochs", 1, "--seed", 0)


@pytest.fixture
def quantized(apiq, model, corpus, tmp_path):
    status, out, err = apiq(
        "quantize", model, "--out", tmp_path / "q", "--method", "apiq-bw", *SMALL, "--calibration", corpus, "--json"
    )
    assert status == 0, err
    return tmp_path / "q", out, err


def test_quantize_prints_one_json_object_and_progress_apart(quantized):
    _, out, err = quantized
    result = json.loads(out)
    assert {"effective_bits", "seconds", "cpu_seconds", "peak_memory_mb"} <= result.keys()
    assert len(result["blocks"]) == 2
    assert all(block["loss_last"] > 0 and block["loss_first"] > 0 for block in result["blocks"])
    assert "block 2/2" in err


def test_another_adapter_on_a_part_of_the_linears(apiq, model, corpus, tmp_path):
    form = ("quantize", model, "--out", tmp_path / "q", *SMALL, "--calibration", corpus)
    status, _, err = apiq(*form, "--adapter", "dora", "--adapter-targets", "attn")
    assert status == 0, err
    config = json.loads((tmp_path / "q" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] and "self_attn" in config["target_modules"] and "mlp" not in config["target_modules"]
    status, _, err = apiq(*form, "--adapter-targets", "attn,query")
    assert status == 1 and "quantize.adapter_targets names query" in err


def test_evaluate_uses_the_adapters_unless_told_not_to(apiq, quantized, corpus):
    folder = quantized[0]
    form = ("--text", corpus, "--windows", 8, "--length", 16, "--json")
    values = []
    for extra in ((), ("--no-adapter",)):
        status, out, err = apiq("evaluate", folder, *form, *extra)
        assert status == 0, err
        values.append(json.loads(out)["perplexity"])
    assert all(1 < value < 10_000 for value in values)
    assert values[0] != values[1]


def test_tasks_may_stand_with_a_space_after_the_comma(apiq, model, monkeypatch):
    asked = []
    monkeypatch.setattr("apiq.evaluation.run.evaluate", lambda *given: asked.append(given[2].tasks) or {})
    assert apiq("evaluate", model, "--tasks", "copa, piqa ,", "--json")[0] == 0
    assert asked == [["copa", "piqa"]]


def test_finetune_and_evaluate_what_came_out(apiq, quantized, corpus, tmp_path):
    folder = quantized[0]
    status, out, err = apiq(
        "finetune", folder, "--text", corpus, "--out", tmp_path / "f", "--length", 16, "--epochs", 1, "--batch-size", 4,
        "-S", "finetune.accumulation=1", "-S", "finetune.learning_rate=0.003", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["held_out_loss_best"] > 0
    status, out, err = apiq("evaluate", tmp_path / "f", "--text", corpus, "--length", 16, "--json")
    assert status == 0, err
    assert json.loads(out)["kind"] == "finetuned"


def test_an_override_reaches_the_parameters(apiq, model, tmp_path):
    form = ("quantize", model, "--out", tmp_path / "q", "--method", "rtn", "--group-size", 16)
    status, out, err = apiq(*form, "-S", "quantize.bits=8", "--json")
    assert status == 0, err
    assert json.loads(out)["bits"]["codes"] == 8


def test_without_json_a_line_for_each_value_is_shown(apiq, model, tmp_path):
    status, out, _ = apiq("quantize", model, "--out", tmp_path / "q", "--method", "rtn", "--group-size", 16)
    assert status == 0
    assert "effective bits" in out and "codes 2" in out
    assert "2, shown by --json" in out, "the blocks"
    assert len(out.splitlines()) < 12


@pytest.mark.parametrize("command", ["refine", "export"])
def test_nothing_that_is_read_is_written_over(apiq, quantized, corpus, command):
    folder, _, _ = quantized
    extra = {"refine": ("--text", corpus, *SMALL[6:10]), "export": ("--format", "dense")}[command]
    status, out, err = apiq(command, folder, "--out", folder, *extra)
    assert (status, out) == (1, "")
    assert f"{folder} holds {folder}, which is read here" in err
    assert apiq("evaluate", folder, "--text", corpus, "--length", 16)[0] == 0


def test_the_full_precision_model_is_not_written_over(apiq, model, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert "which is read here" in apiq("quantize", model, "--out", model, "--method", "rtn")[2]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    status, _, err = apiq("quantize", model, "--out", tmp_path / "mine", "--method", "rtn")
    assert status == 1 and "did not write there (thesis.txt)" in err and "quantize 0/" not in err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_number_that_is_none_outside_the_blocks_is_found_before_the_first_block(apiq, model, corpus, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 7] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    status, _, err = apiq("quantize", broken, "--out", tmp_path / "q", *SMALL, "--calibration", corpus)
    assert status == 1 and "the weight model.embed_tokens.weight of the model holds a value that is not finite" in err
    assert "block 1/" not in err


def test_control_c_says_that_the_same_command_goes_on(model, corpus, tmp_path):
    form = ["quantize", model, "--out", tmp_path / "q", *SMALL, "--calibration", corpus, "-S", "quantize.epochs=10000"]
    environment = {**os.environ, "APIQ_WORK": str(tmp_path / "work")}
    command = [sys.executable, "-m", "apiq.cli", *map(str, form)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, preexec_fn=heard
    ) as process:
        limit = threading.Timer(100, process.kill)
        limit.start()
        assert any("block 1/2" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        limit.cancel()
    assert process.returncode == 130
    assert "apiq: stopped; what is finished is kept, and the same command goes on." in rest
    assert "Traceback" not in rest


def test_advice_for_a_folder_of_the_wrong_kind(apiq, quantized, model, corpus, tmp_path):
    folder, _, _ = quantized
    form = ("--text", corpus, "--length", 16)
    assert apiq("finetune", folder, "--out", tmp_path / "tuned", *form, "--epochs", 1)[0] == 0
    assert "is finetuned" in apiq("refine", tmp_path / "tuned", "--out", tmp_path / "r", *form)[2]
    assert "run apiq quantize first" in apiq("finetune", model, "--out", tmp_path / "t", *form)[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--bits", 9), r"quantize.bits is 9"),
        (("-S", "quantize.bit=3"), "quantize.bit is not a parameter; did you mean bits?"),
        (("-S", "bits=3"), "section.key=value"),
        (("-S", "refine.epochs=3"), "-S refine.epochs=3 sets what this command does not read; it reads quantize and"),
        (("--calibration", "missing.txt"), "missing.txt"),
        (("--group-size", 49), "quantize.group_size is 49; it must be at most 48, the widest row of a linear"),
        (("--rank", 400), "quantize.rank is 400; it must be at most 16"),
        (("--length", 64), "calibration.length is 64; it must be at most 32"),
    ],
)
def test_a_refusal_is_one_sentence_and_status_1(apiq, model, corpus, tmp_path, arguments, sentence):
    form = ("quantize", model, "--out", tmp_path / "q", "--windows", 4, "--length", 16, "--group-size", 16)
    status, out, err = apiq(*form, "--rank", 4, "--epochs", 1, "--calibration", corpus, *arguments, "--json")
    assert status == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("apiq: ")
    assert sentence in last
    assert "Traceback" not in err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("text", ["", "w3 w4 w5"])
def test_an_empty_or_too_short_corpus(apiq, model, tmp_path, text):
    (tmp_path / "short.txt").write_text(text)
    status, out, err = apiq(
        "quantize", model, "--out", tmp_path / "q", *SMALL, "--calibration", tmp_path / "short.txt", "--json"
    )
    assert (status, out) == (1, "")
    assert "short.txt" in err or "tokens" in err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "arguments", [("quantize",), ("quantize", "x"), ("evaluate", "x"), ("finetune", "x", "--out", "y"), ("nonsense",)]
)
def test_wrong_usage_is_status_2(apiq, arguments):
    assert apiq(*arguments)[0] == 2


@pytest.mark.parametrize("command", ["quantize", "evaluate", "finetune", "report", "profile"])
def test_help_teaches(apiq, command):
    status, out, _ = apiq(command, "--help")
    assert status == 0
    assert "--json" in out


def test_a_model_that_is_not_there(apiq, tmp_path):
    status, out, err = apiq("quantize", tmp_path / "nothing", "--out", tmp_path / "q", "--method", "rtn", "--json")
    assert (status, out) == (1, "")
    assert "nothing" in err


def test_the_calls_that_are_shown_do_what_the_commands_do(model, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, "train.jsonl")
    Path("test.txt").write_text(" ".join(f"w{3 + i % (WORDS - 3)}" for i in range(100)))
    page = Path(__file__).parents[2] / "docs/reference/python.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for shown, tiny in {"MODEL": str(model), "128": "4", "2048": "16", "1024": "16", "=64": "=16"}.items():
        code = code.replace(shown, tiny)
    exec(code, {})
    assert float(capsys.readouterr().out) > 1
    assert set(package.__all__) <= set(dir(package))
