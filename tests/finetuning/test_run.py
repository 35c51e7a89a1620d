import copy
import csv
import errno
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from apiq.checkpoint import manifest
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.evaluation.perplexity import perplexity
from apiq.files import sha256_folder
from apiq.finetuning import run
from apiq.finetuning.run import finetune
from apiq.finetuning.sources import prepare
from apiq.work import alone

# peft 0.21 itself asks transformers for this
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WEIGHTS = "adapter/adapter_model.safetensors"


class Killed(BaseException):
    """As hard as a signal: nothing catches it."""


def killed_at(step):
    def progress(report):
        if report.done == step:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def whole_run(quantized, params, tmp_path_factory):
    """A run that nothing disturbed: its folder and what it returned."""
    out = tmp_path_factory.mktemp("run") / "finetuned"
    return out, finetune(quantized, params, out)


def test_learns_and_writes_what_it_says(quantized, params, whole_run, work):
    out, result = whole_run
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == {key: result[key] for key in metrics}
    assert metrics["held_out_loss_best"] < metrics["held_out_loss_first"] - 0.1
    assert (metrics["steps"], metrics["tokens"]) == (12, 3 * 32 * 16)
    assert {"seconds", "cpu_seconds", "peak_memory_mb"} <= result.keys() - metrics.keys()
    with open(out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(13))
    assert [int(row["step"]) for row in rows if row["held_out_loss"]] == [0, 4, 8, 12]
    assert min(float(row["held_out_loss"] or "inf") for row in rows) == metrics["held_out_loss_best"]


def test_finetuned_below_symlinked_folders_it_finds_its_base(quantized, params, tmp_path):
    (tmp_path / "disk/deep/runs").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    shutil.copytree(quantized, tmp_path / "disk/deep/quantized")
    (tmp_path / "link").symlink_to(tmp_path / "disk/deep/runs")
    (tmp_path / "models/named").symlink_to(tmp_path / "disk/deep/quantized")
    short = params.model_copy(update={"epochs": 0.1, "checkpoints": 1})
    finetune(tmp_path / "models/named", short, tmp_path / "link/finetuned")
    for base in (load(tmp_path / "link/finetuned").folder, adapter_base(tmp_path / "link/finetuned")):
        assert base == tmp_path / "disk/deep/quantized"


def adapter_base(folder):
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    return (folder / "adapter" / config["base_model_name_or_path"]).resolve()


def test_a_second_process_does_not_do_the_same_work(quantized, params, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("apiq.finetuning.run.work_folder", lambda identity: tmp_path / "work")
    with alone(tmp_path / "work"), pytest.raises(ApiqError, match="another process is doing this very work"):
        finetune(quantized, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_work_of_another_number_of_processes_is_not_taken_up(quantized, params, tmp_path, monkeypatch):
    asked = []

    def stop(identity):
        asked.append(identity)
        raise Killed

    monkeypatch.setattr("apiq.finetuning.run.work_folder", stop)
    for size in (1, 2):
        monkeypatch.setattr("apiq.finetuning.run.parallel.size", lambda size=size: size)
        with pytest.raises(Killed):
            finetune(quantized, params, tmp_path / "out")
    assert [identity.pop("processes") for identity in asked] == [1, 2]
    assert asked[0] == asked[1]


def test_the_folder_loads_as_the_model_that_was_measured(quantized, params, whole_run):
    out, result = whole_run
    assert manifest.verify(out)["base"] == os.path.relpath(quantized, out)
    assert (
        out / "adapter" / json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    ).samefile(quantized)
    loaded = load(out)
    held_out = torch.tensor([example["input_ids"] for example in prepare(params, loaded.tokenizer, 32).held_out])
    assert perplexity(loaded.model, held_out) == pytest.approx(
        torch.tensor(result["held_out_loss_best"]).exp().item(), rel=1e-5
    )


def test_the_base_is_left_as_it_was(quantized, params, tmp_path):
    before = sha256_folder(quantized)
    finetune(quantized, params, tmp_path / "out")
    assert sha256_folder(quantized) == before


def test_two_runs_are_the_same_to_the_byte(quantized, params, whole_run, tmp_path):
    again = tmp_path / "again"
    finetune(quantized, params, again)
    assert sha256_folder(again) == sha256_folder(whole_run[0])


def test_recomputing_activations_changes_nothing(quantized, params, whole_run, tmp_path):
    out = tmp_path / "out"
    finetune(quantized, params.model_copy(update={"activation_checkpointing": True}), out)
    assert sha256_folder(out) == sha256_folder(whole_run[0])


@pytest.mark.parametrize("step", [2, 4, 6, 11])
def test_a_killed_run_goes_on_to_the_same_bytes(quantized, params, whole_run, tmp_path, work, step):
    out, reports = tmp_path / "out", []
    with pytest.raises(Killed):
        finetune(quantized, params, out, killed_at(step))
    assert not out.exists()
    finetune(quantized, params, out, reports.append)
    assert not any(work.iterdir())
    assert reports[0].done == (step - 1) // 4 * 4 + 1
    assert sha256_folder(out) == sha256_folder(whole_run[0])


@pytest.mark.parametrize("epochs", [1, 1.5])
def test_a_run_that_could_not_write_its_result_takes_no_step_more(quantized, params, tmp_path, monkeypatch, epochs):
    chosen, write, reports = params.model_copy(update={"epochs": epochs}), run._write, []
    finetune(quantized, chosen, tmp_path / "whole")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "_write", full)
    with pytest.raises(OSError, match="No space"):
        finetune(quantized, chosen, tmp_path / "out")
    monkeypatch.setattr(run, "_write", write)
    finetune(quantized, chosen, tmp_path / "out", reports.append)
    assert not reports
    assert sha256_folder(tmp_path / "out") == sha256_folder(tmp_path / "whole")


def test_a_half_written_checkpoint_is_not_taken_up(quantized, params, whole_run, tmp_path, work):
    out, reports = tmp_path / "out", []
    with pytest.raises(Killed):
        finetune(quantized, params, out, killed_at(9))
    (half,) = work.glob("*/checkpoint-8")
    (half / "complete").unlink()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    finetune(quantized, params, out, reports.append)
    assert reports[0].done == 5
    assert sha256_folder(out) == sha256_folder(whole_run[0])


def test_training_that_only_hurts_gives_the_adapters_it_began_with(whole_run, params, tmp_path):
    start, out = whole_run[0], tmp_path / "out"
    one_leap = {"learning_rate": 1.0, "warmup": 0.0, "epochs": 0.25, "checkpoints": 1}
    result = finetune(start, params.model_copy(update=one_leap), out)
    assert (result["steps"], result["best_step"]) == (1, 0)
    assert result["held_out_loss_best"] == result["held_out_loss_first"] == whole_run[1]["held_out_loss_best"]
    trained, began = load_file(out / WEIGHTS), load_file(start / WEIGHTS)
    assert trained.keys() == began.keys()
    assert all(torch.equal(trained[key], began[key]) for key in began)


def test_tokens_that_the_model_does_not_know_are_refused(quantized, params, tokenizer, tmp_path):
    base, larger = shutil.copytree(quantized, tmp_path / "quantized"), copy.deepcopy(tokenizer)
    larger.add_tokens(["b c"])
    larger.save_pretrained(base)
    manifest.write(base, "quantized")
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 20)
    with pytest.raises(ApiqError, match="the examples hold token 29, the model knows 29"):
        finetune(base, params.model_copy(update={"text": str(tmp_path / "text.txt")}), tmp_path / "out")


def test_pairs_are_learned(quantized, pairs, params, tmp_path):
    update = {
        "task": "instruction",
        "pairs": str(pairs),
        "length": 8,
        "batch_size": 1,
        "accumulation": 1,
        "epochs": 8.0,
    }
    result = finetune(quantized, params.model_copy(update=update), tmp_path / "out")
    assert result["dropped_pairs"] == 2
    assert result["held_out_loss_best"] < result["held_out_loss_first"] - 0.4


def test_packed_pairs_have_the_losses_of_the_pairs_apart(quantized, pairs, params, tmp_path):
    """One step on all of them: the loss before it, and after it the held-out loss."""
    update = {"task": "instruction", "pairs": str(pairs), "length": 16, "held_out": 0.3, "batch_size": 8}
    update |= {"accumulation": 1, "epochs": 1.0, "checkpoints": 1, "warmup": 0.0}
    apart = finetune(quantized, params.model_copy(update=update), tmp_path / "apart")
    packed = finetune(quantized, params.model_copy(update=update | {"packing": True}), tmp_path / "packed")
    assert (apart["train_pairs"], packed["train_pairs"], packed["train_sequences"]) == (5, 5, 3)
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("apart", "packed")]
    assert len(logs[0]) == 2
    for row, other in zip(*logs, strict=True):
        for key in ("loss", "held_out_loss"):
            assert float(row[key] or 0) == pytest.approx(float(other[key] or 0), abs=1e-5)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_what_is_done(quantized, params, text, tmp_path, work):
    letters = text.read_text().split()
    letters[5] = "?"  # <unk>, whose embedding is not a number, in a window that this seed does not train on at once
    broken = tmp_path / "broken.txt"
    broken.write_text(" ".join(letters))
    params = params.model_copy(update={"text": str(broken), "seed": 3, "checkpoints": 12})
    with pytest.raises(
        ApiqError, match=r"the loss is not finite at step \d+ of finetuning; lower finetune.learning_rate"
    ):
        finetune(quantized, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(work.glob("*/checkpoint-*/complete"))


def test_a_folder_without_adapters_is_refused(quantized, params, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(quantized, bare, ignore=shutil.ignore_patterns("adapter", "apiq.json"))
    manifest.write(bare, "quantized")
    with pytest.raises(ApiqError, match="has no adapters to train; quantize with a method that gives it some: qlora"):
        finetune(bare, params, tmp_path / "out")


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"dtype": "float16", "device": "cpu"}, "float16, which cannot be trained on a CPU"),
        ({"length": 33}, "at most 32"),
    ],
)
def test_what_cannot_be_trained_is_refused(quantized, params, tmp_path, update, reason):
    with pytest.raises(ApiqError, match=reason):
        finetune(quantized, params.model_copy(update=update), tmp_path / "out")


def test_nothing_is_printed_and_the_random_state_is_given_back(quantized, params, tmp_path, capfd):
    states = random.getstate(), torch.get_rng_state()
    finetune(quantized, params, tmp_path / "out")
    assert capfd.readouterr().out == ""
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
