"""The whole plan: from a config.json alone, on this machine or on a made-up one."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch
from transformers import LlamaConfig

from apiq.errors import ApiqError
from apiq.method_params import WITHOUT_ADAPTERS, Method
from apiq.params import parse
from apiq.planning import needs as needing
from apiq.planning import plan as planning
from apiq.planning.plan import plan
from apiq.planning.shortfalls import offloaded
from apiq.planning.trial import narrowed

SETTINGS = {
    "calibration": {"windows": 4, "length": 16},
    "quantize": {"rank": 4, "group_size": 16, "epochs": 2, "device": "cpu"},
    "finetune": {"length": 16, "batch_size": 2, "device": "cpu"},
    "evaluate": {"perplexity": {"demo": {"text": "demo", "length": 16}}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "outline")
    return tmp_path / "outline"


def params(folder, **sections):
    laid = {key: {**SETTINGS.get(key, {}), **sections.get(key, {})} for key in {*SETTINGS, *sections}}
    return parse({"model": {"source": str(folder)}, **laid})


def test_a_plan_is_json_and_says_what_was_asked(folder):
    told = json.loads(json.dumps(plan(params(folder), timed=False), allow_nan=False))
    assert told["model"]["blocks"] == 3
    assert told["result"]["effective_bits"] == pytest.approx(sum(
        told["result"]["bits"][part] for part in ("codes", "scales", "zeros", "adapters")))  # fmt: skip
    assert told["quantize"]["activations"] == "ram"
    assert told["quantize"]["gpu"] is None
    assert "seconds" not in told["quantize"]
    assert told["problems"] == []
    assert list(folder.iterdir()) == [folder / "config.json"]


def test_the_time_is_measured_on_this_machine(folder, tmp_path):
    told = plan(params(folder), out=tmp_path / "out")
    quantizing = told["quantize"]
    assert quantizing["trial"] == {"windows": 1, "length": 16, "narrower": 1, "seconds": quantizing["trial"]["seconds"]}
    assert 0 < quantizing["cpu_seconds"] < 60
    assert told["finetune"]["tokens_per_second"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["outline"]


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_is_planned(method, folder):
    told = plan(params(folder, quantize={"method": method, "bits": 4, "group_size": 16}), timed=False)
    assert (told["finetune"] is None) == (method in WITHOUT_ADAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["omniquant", "closed-form", "lq-lora"])
def test_methods_that_descend_take_moments_or_look_at_weights_are_timed(method, folder):
    told = plan(params(folder, quantize={"method": method, "bits": 4, "group_size": 16}))
    assert told["quantize"]["seconds"] > 0


def test_fisher_weights_hold_the_inputs_of_all_blocks_and_gradients_of_one(folder):
    plain, fisher = (
        plan(params(folder, quantize={"method": "lq-lora", "lq_lora": {"weights": weights}}), timed=False)["quantize"]
        for weights in ("none", "fisher")
    )
    assert plain["ram"]["activations"] == 4 * 4 * 16 * 32 * 4
    assert fisher["ram"]["activations"] == (3 + 2) * 4 * 16 * 32 * 4
    assert fisher["ram"]["gradients"] == 2 * fisher["ram"]["block"]


def test_a_target_of_bits_is_planned_without_weights(folder):
    wanted = {"target_bits": 3.7, "candidate_group_sizes": [16, 32]}
    told = plan(params(folder, quantize={"method": "apiq-bw", **wanted}), timed=False)
    bits = told["result"]["bits"]
    assert 3.5 < bits["codes"] + bits["scales"] + bits["zeros"] <= 3.7
    ranks = {"rank": 4, "candidate_ranks": [1, 3, 8]}
    mixed = plan(params(folder, quantize={"method": "apiq-bw", **wanted, **ranks}), timed=False)["result"]["bits"]
    even = plan(params(folder, quantize={"method": "apiq-bw", "rank": 4}), timed=False)["result"]["bits"]
    assert 0.8 * even["adapters"] < mixed["adapters"] <= even["adapters"]
    with pytest.raises(ApiqError, match=r"quantize\.target_bits is 2\.05, but the smallest candidates take"):
        plan(params(folder, quantize={"target_bits": 2.05}), timed=False)


def test_rounding_leaves_nothing_to_finetune(folder):
    told = plan(params(folder, quantize={"method": "rtn"}), timed=False)
    assert told["finetune"] is None
    assert "optimizer" not in told["quantize"]["ram"]
    assert told["result"]["bits"]["adapters"] == 0


def test_checkpointing_needs_less(folder):
    without = plan(params(folder), timed=False)["finetune"]["ram"]
    with_it = plan(params(folder, finetune={"activation_checkpointing": True}), timed=False)["finetune"]["ram"]
    assert with_it["activations"] < without["activations"] / 3


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"calibration": {"length": 65}}, "calibration.length is 65; it should be at most 64"),
        ({"finetune": {"length": 80}}, "finetune.length is 80; it should be at most 64"),
        ({"quantize": {"rank": 17}}, "quantize.rank is 17; it should be at most 16"),
        ({"quantize": {"group_size": 49}}, "quantize.group_size is 49; it should be at most 48"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(folder, sections, sentence):
    with pytest.raises(ApiqError, match=sentence):
        plan(params(folder, **sections), timed=False)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("nobody/nothing", "neither in the cache nor to be had"), ("./nowhere", "there is no model folder")],
)
def test_a_model_that_cannot_be_had(source, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ApiqError, match=sentence):
        plan(parse({"model": {"source": source}}), timed=False)


def test_an_empty_folder_and_a_quantized_one(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ApiqError, match=r"has no config\.json to plan from"):
        plan(params(tmp_path / "empty"), timed=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "apiq"}}))
    with pytest.raises(ApiqError, match="is quantized already"):
        plan(params(folder), timed=False)


def test_refining_is_counted_with_the_predictions_that_it_learns_from(folder):
    told = plan(params(folder, refine={"top_k": 8, "generated": 3, "batch_size": 2, "device": "cpu"}), timed=False)
    positions = 4 * (1 + 3) * 16
    assert told["refine"]["ram"]["predictions"] == positions * 8 * (4 + 4)
    everything = plan(params(folder, refine={"top_k": 100, "generated": 3}), timed=False)["refine"]["ram"]
    assert everything["predictions"] == positions * 61 * 4
    without = plan(params(folder, refine={"top_k": 100, "generated": 3, "hidden_weight": 0}), timed=False)["refine"]
    more = plan(params(folder, refine={"top_k": 100, "generated": 3, "device": "cpu"}), timed=False)["refine"]
    assert more["disk"]["unfinished work"] - without["disk"]["unfinished work"] == positions * 32 * 4, "hidden states"
    trained = told["result"]["adapter_parameters"]
    assert told["refine"]["ram"]["adapters and optimizer"] == 7 * 4 * trained
    assert told["finetune"]["ram"]["adapters and optimizer"] == 4 * 4 * trained
    assert plan(params(folder, refine={"epochs": 0}), timed=False)["refine"] is None
    assert plan(params(folder, quantize={"method": "rtn"}), timed=False)["refine"] is None


def test_refining_scales_alone_is_planned_too(folder):
    given = params(folder, quantize={"method": "rtn"}, refine={"lr_scales": 0.001, "device": "cpu"})
    told = plan(given, timed=False)["refine"]
    groups = 3 * (2 * 32 * 2 + 2 * 16 * 2 + 2 * 48 * 2 + 32 * 3)
    assert told["ram"]["adapters and optimizer"] == 7 * 4 * groups


def test_what_is_not_finetuned_may_be_longer_than_the_context(folder):
    told = plan(params(folder, finetune={"task": "none", "length": 80}), timed=False)
    assert told["finetune"] is None


def test_refining_counts_two_sets_of_activations_where_auto_puts_them(folder, monkeypatch):
    monkeypatch.setattr(needing, "count_head", lambda *given: 1)  # torch for the CPU cannot count it on a GPU
    refine = {"top_k": 1, "generated": 8, "device": "cpu", "dtype": "float32"}
    setting = planning._setting(params(folder, calibration={"windows": 64}, refine=refine), folder)
    sets = 2 * 64 * (1 + 8) * 16 * 32 * 4

    def needs(**free):
        machine = dataclasses.replace(setting.machine, **free)
        device = torch.device("cuda" if "gpu" in free else "cpu")
        given = dataclasses.replace(setting, machine=machine, refining_device=device)
        return needing.refining_needs(given)

    roomy, tight = needs(), needs(ram=2 * sets)
    assert (roomy["activations"], tight["activations"]) == ("ram", "disk")
    assert roomy["ram"]["activations"] == sets
    asked = roomy["ram"]  # at the moment at which the full-precision model makes predictions of its last hidden states
    assert {"adapters", "outside the blocks", "logits"} <= set(asked)
    assert asked["logits"] >= 2 * 64 * 9 * 16 * 61 * 4
    assert asked["predictions"] == 2 * 64 * 9 * 16 * 8
    monkeypatch.setattr(needing, "count_predictions", lambda *given: 0)
    assert {"adapters", "block", "step"} <= set(needs()["ram"]), "windows pass through a block"
    assert "activations" not in tight["ram"]
    packed = roomy["ram"]["packed model"]
    fast, slower = needs(gpu=2 * sets + packed), needs(gpu=2 * sets + packed - 1)
    assert (fast["activations"], slower["activations"]) == ("gpu", "ram")
    assert fast["gpu"]["activations"] == slower["ram"]["activations"] == sets
    assert "activations" not in slower["gpu"]
    assert tight["disk"]["unfinished work"] == 64 * 9 * 16 * 8 + sets
    assert roomy["disk"]["unfinished work"] < sets
    assert offloaded({"gpu": None, "activations": "ram"}, roomy) == []
    assert "in refinement the activations" in offloaded({"gpu": None, "activations": "ram"}, tight)[0]


def test_evaluating_loads_the_full_precision_model_whole(folder):
    def needs(gpu=None, **evaluate):
        setting = planning._setting(params(folder, evaluate=evaluate), folder)
        machine = dataclasses.replace(setting.machine, gpu=gpu)
        return needing.evaluating_needs(dataclasses.replace(setting, machine=machine))

    told = plan(params(folder), timed=False)
    assert told["evaluate"]["ram"]["full-precision model"] == 4 * told["model"]["parameters"]
    assert needs(dtype="bfloat16")["ram"]["full-precision model"] == 2 * told["model"]["parameters"]
    assert needs(gpu=10**9, device="cpu")["gpu"] is None


def test_a_gpu_that_is_too_small_for_the_activations_sends_them_to_ram(folder):
    setting = planning._setting(params(folder), folder)

    def needs(gpu):
        return needing.quantizing_needs(
            dataclasses.replace(setting, machine=dataclasses.replace(setting.machine, gpu=gpu))
        )

    roomy, sets = needs(10**9), 5 * 4 * 16 * 32 * 4
    assert roomy["gpu"]["activations"] == sets
    assert needs(2 * sets)["activations"] == "gpu"
    tight = needs(2 * sets - 1)
    assert tight["activations"] == "ram"
    assert tight["ram"]["activations"] == sets
    assert "activations" not in tight["gpu"]


def test_a_narrower_model_keeps_the_width_of_its_heads():
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=8)
    text = narrowed(config, 4)
    assert (text.hidden_size, text.intermediate_size) == (1024, 2752)
    assert (text.num_attention_heads, text.num_key_value_heads) == (8, 2)
    assert text.hidden_size // text.num_attention_heads == 4096 // 32
    assert config.hidden_size == 4096


CHILD = """
import json, sys, torch
from apiq.params import QuantizeParams
from apiq.quantization import quantize
small, folder, out, windows, length = sys.argv[1:4] + [int(n) for n in sys.argv[4:]]
settings = QuantizeParams(recipe="best", rank=4, group_size=64, epochs=1, device="cpu")
def peak():  # of this program: ru_maxrss starts with that of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
quantize(small, torch.randint(0, 61, (2, 8)), settings, out)
before = peak()
quantize(folder, torch.randint(0, 61, (windows, length)), settings, out)
print(json.dumps((peak() - before) * 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_predicted_memory_against_the_peak_of_a_child_process(tmp_path, monkeypatch):
    """What is alive, that is: with the C library told to give back all that is freed."""
    from transformers import LlamaForCausalLM

    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    for name, width, blocks in (("small", 64, 1), ("large", 512, 4)):
        config = LlamaConfig(
            vocab_size=61, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out")]
    giving = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    child = subprocess.run([*command, "32", "32"], capture_output=True, check=True, text=True, env=giving)
    measured = int(child.stdout)
    settings = params(
        tmp_path / "large", calibration={"windows": 32, "length": 32}, quantize={"epochs": 1, "group_size": 64}
    )
    need = plan(settings, timed=False)["quantize"]["ram"]
    predicted = sum(size for part, size in need.items() if part not in ("interpreter", "kept by the allocator"))
    assert predicted == pytest.approx(measured, rel=0.25), (need, measured)
