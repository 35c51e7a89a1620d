"""What does not fit a made-up machine, and what is said of it."""

import dataclasses

import torch

from apiq.params import parse
from apiq.planning.machine import Machine, look
from apiq.planning.shortfalls import problems

DISKS = {"result": 10**9, "unfinished work": 10**9}
ROOM = Machine("cpu", 1, 0.0, ram=10**9, gpu=None, disk=DISKS, one_disk=False, interpreter=10**8)


def told_problems(machine=ROOM, ram=10**8, gpu=None, refining=None, tuning=None, disk=10**6, model=10**6, **sections):
    settings = parse({"quantize": {"batch_size": 1}, **sections})
    needs = {"ram": {"activations": ram, "block": 10**6}, "gpu": gpu, "disk": {"result": disk, "unfinished work": disk}}
    whole = {"full-precision model": model}
    evaluating = {"gpu": None, "ram": whole} if gpu is None else {"gpu": whole, "ram": {}}
    return problems(settings, needs, refining, tuning, evaluating, machine)


def test_what_fits_is_no_problem():
    assert told_problems() == []


def test_too_little_ram_names_windows_that_would_fit():
    (sentence,) = told_problems(ram=2 * 10**9, calibration={"windows": 128})
    windows = int(sentence.rpartition(" to ")[2].rstrip("."))
    assert "set calibration.windows from 128 to" in sentence
    assert told_problems(ram=2 * 10**9 * windows // 128, calibration={"windows": windows}) == []
    assert told_problems(ram=2 * 10**9 * (windows + 1) // 128, calibration={"windows": windows + 1}) != []


def test_too_little_gpu_memory_and_disk():
    machine = dataclasses.replace(ROOM, gpu=100)
    (sentence,) = told_problems(machine, gpu={"block": 200}, model=80, quantize={"batch_size": 8})
    assert "set quantize.batch_size from 8 to 1" in sentence


def test_what_lies_on_one_disk_at_once_is_added_up():
    first, second = told_problems(disk=2 * 10**9)
    assert first.endswith("and 1.0 GB are free there: set --out to a folder on a larger disk.")
    assert second.endswith("set the environment variable APIQ_WORK to a folder on a larger disk.")
    assert told_problems(disk=6 * 10**8) == []
    shared = dataclasses.replace(ROOM, one_disk=True)
    assert told_problems(shared, disk=5 * 10**8) == []
    (sentence,) = told_problems(shared, disk=6 * 10**8)
    assert sentence == (
        "quantizing needs 1.2 GB of disk at once (result 600.0 MB, unfinished work 600.0 MB) and 1.0 GB are free "
        "there: set --out or the environment variable APIQ_WORK to a folder on a larger disk."
    )


def test_the_disk_of_refinement_is_looked_at():
    disk = {"quantized model": 5 * 10**8, "result": 5 * 10**8, "unfinished work": 10**9}
    need = {"ram": {}, "gpu": None, "disk": disk}
    assert told_problems(refining=need) == []
    (work,) = told_problems(refining={**need, "disk": {**disk, "unfinished work": 2 * 10**9}})
    assert work.startswith("refining needs 2.0 GB of disk at once (unfinished work 2.0 GB)")
    (shared,) = told_problems(dataclasses.replace(ROOM, one_disk=True), refining=need)
    assert shared.startswith("refining needs 2.0 GB of disk at once (quantized model 500.0 MB, result 500.0 MB, ")


def test_the_machine_says_which_folders_share_a_disk(tmp_path, monkeypatch):
    cpu, folders = torch.device("cpu"), {"result": tmp_path / "new", "unfinished work": tmp_path}
    assert look(cpu, folders).one_disk
    monkeypatch.setattr("apiq.planning.machine.same_disk", lambda one, other: one == other)
    assert not look(cpu, folders).one_disk


def test_refining_that_does_not_fit_is_told_the_next_thing_to_change():
    (first,) = told_problems(refining={"ram": {"predictions": 3 * 10**9}, "gpu": None, "disk": {}})
    assert "set refine.generated from 8 to 4" in first
    need = {"ram": {"activations": 3 * 10**9}, "gpu": None, "disk": {}}
    (second,) = told_problems(refining=need)
    assert "set refine.batch_size from 4 to 2" in second
    (third,) = told_problems(refining=need, refine={"batch_size": 1, "activation_checkpointing": False})
    assert "set refine.activation_checkpointing from false to true" in third


def test_finetuning_that_does_not_fit_is_told_the_next_thing_to_change():
    need = {"ram": {"activations": 3 * 10**9}, "gpu": None}
    (first,) = told_problems(tuning=need)
    assert "set finetune.activation_checkpointing from false to true" in first
    (second,) = told_problems(tuning=need, finetune={"activation_checkpointing": True, "batch_size": 4})
    assert "finetune.batch_size from 4 to 2 and finetune.accumulation from 16 to 32" in second


def test_a_full_precision_model_that_does_not_fit_will_be_spread():
    assert told_problems(model=8 * 10**8) == []
    (sentence,) = told_problems(model=8 * 10**8 + 1)
    assert "needs 800.0 MB of RAM for the full-precision model, which may take 800.0 MB of the 1.0 GB" in sentence
    assert sentence.endswith("spread it over RAM and disk, which is slow; take a machine with more.")
    gpu = dataclasses.replace(ROOM, gpu=10**9)
    (sentence,) = told_problems(gpu, gpu={}, model=10**10, evaluate={"dtype": "float32"})
    assert "over GPU, RAM and disk, which is slow; set evaluate.dtype from float32 to bfloat16" in sentence
