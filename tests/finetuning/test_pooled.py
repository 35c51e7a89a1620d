"""Pooled finetuning of what quantization writes: A stays constant within groups, and the merge changes nothing."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import apiq
from apiq.adapters.pooled import pooled, values
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.exports.zeros import merge_into_zeros
from apiq.files import read_json, sha256_folder
from apiq.finetuning.run import finetune
from apiq.params import FinetuneParams, QuantizeParams, parse
from apiq.quantization import quantize

# peft 0.21 itself asks transformers for this
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WEIGHTS = "adapter/adapter_model.safetensors"


class Killed(BaseException):
    """As hard as a signal: nothing catches it."""


@pytest.fixture(scope="module")
def full(tokenizer, tmp_path_factory):
    """A model whose 43 inner channels no group size divides."""
    folder = tmp_path_factory.mktemp("full")
    shape = {"hidden_size": 32, "intermediate_size": 43, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windows():
    return torch.randint(1, 27, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def make(full, windows, tmp_path_factory):
    """A quantized folder in 2 bits with adapters."""
    made = {}

    def make(**update):
        key = repr(update)
        if key not in made:
            home = tmp_path_factory.mktemp("made")
            params = QuantizeParams(**{"group_size": 12, "rank": 4, "epochs": 1, "lr_adapter": 0.01, **update})
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("APIQ_WORK", str(home / "work"))
                quantize(full, windows, params, home / "quantized")
            made[key] = home / "quantized"
        return made[key]

    return make


@pytest.fixture(scope="module")
def settings(params):
    return params.model_copy(update={"pooled": True})


def widths(folder):
    """The width of the groups below each A, by its name."""
    model = load(folder, device="cpu", adapters=False).model
    return {
        f"base_model.model.{name}.lora_A.weight": module.grid.width(module.in_features)
        for name, module in model.named_modules()
        if hasattr(module, "grid")
    }


def assert_pooled(folder, base):
    state, known = load_file(folder / WEIGHTS), widths(base)
    assert known.keys() == {key for key in state if "lora_A" in key} and len(known) == 14
    assert all(values(state[key], width) is not None for key, width in known.items())
    return state


@pytest.mark.parametrize(
    "update",
    [
        {"method": "apiq-bw", "rank": 3},
        {"method": "apiq-lw", "group_size": 0, "symmetric": True, "adapter": "rslora"},
        {"method": "gptq-lora", "target_bits": 5.5, "candidate_group_sizes": [12, 20], "sensitivity": "none"},
    ],
    ids=lambda update: update["method"],
)
def test_quantized_trained_and_merged(make, settings, windows, tmp_path, update):
    base = make(pooled=True, **update)
    start = assert_pooled(base, base)
    assert any(bool(value.any()) for key, value in start.items() if "lora_B" in key) == (
        update["method"] != "gptq-lora"
    )
    result = finetune(base, settings, tmp_path / "tuned")
    assert result["pooled_change"] == read_json(tmp_path / "tuned/metrics.json")["pooled_change"] == 0
    assert result["held_out_loss_best"] < result["held_out_loss_first"] - 0.01
    trained = assert_pooled(tmp_path / "tuned", base)
    assert not any(torch.equal(trained[key], start[key]) for key in start)

    merge_into_zeros(tmp_path / "tuned", tmp_path / "merged")
    with torch.no_grad():
        expected = load(tmp_path / "tuned", device="cpu").model(windows).logits
        found = load(tmp_path / "merged", device="cpu").model(windows).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(load(base, device="cpu").model(windows).logits, expected, atol=1e-2)


def test_other_adapters_are_pooled_first_and_it_is_said_what_that_changes(make, settings, tmp_path):
    """One step that only hurts: what is kept is the start."""
    base = make()
    before = load_file(base / WEIGHTS)
    hurting = settings.model_copy(update={"learning_rate": 1.0, "warmup": 0.0, "epochs": 0.25, "checkpoints": 1})
    result = finetune(base, hurting, tmp_path / "out")
    assert (result["steps"], result["best_step"]) == (1, 0)
    kept, known = assert_pooled(tmp_path / "out", base), widths(base)
    moved = whole = 0.0
    for key, A in before.items():
        if key not in known:
            assert torch.equal(kept[key], A)
            continue
        expected = pooled(A, before[key.replace("lora_A", "lora_B")], known[key])
        assert torch.equal(kept[key], expected)
        moved, whole = moved + float((kept[key] - A).square().sum()), whole + float(A.square().sum())
    assert result["pooled_change"] == pytest.approx((moved / whole) ** 0.5, rel=1e-4)
    assert 0.5 < result["pooled_change"] < 1.1


@pytest.mark.parametrize("step", [2, 6])
def test_a_killed_run_goes_on_to_the_same_bytes(make, settings, tmp_path, work, step):
    base = make()

    def progress(report):
        if report.done == step:
            raise Killed

    finetune(base, settings, tmp_path / "whole")
    with pytest.raises(Killed):
        finetune(base, settings, tmp_path / "killed", progress)
    assert list(work.iterdir())
    finetune(base, settings, tmp_path / "killed")
    assert sha256_folder(tmp_path / "killed") == sha256_folder(tmp_path / "whole")


def test_what_is_not_pooled_is_not_merged(make, params, tmp_path):
    finetune(make(pooled=True), params, tmp_path / "tuned")
    with pytest.raises(ApiqError, match=r"A of the adapter on model\.layers\.0\.\S+ differs within a group"):
        merge_into_zeros(tmp_path / "tuned", tmp_path / "merged")
    apiq.merge(tmp_path / "tuned", tmp_path / "dense")


def test_a_model_that_is_not_quantized_is_refused(quantized, settings, tmp_path):
    with pytest.raises(ApiqError, match=r"finetune\.pooled is true, and .* is not quantized and so no zero points"):
        finetune(quantized, settings, tmp_path / "out")


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw-8bit"])
def test_moments_in_8_bits_are_refused(optimizer):
    with pytest.raises(
        ApiqError, match=rf"finetune\.optimizer is '{optimizer}'; it should be adamw when pooled is true"
    ):
        parse({"finetune": {"pooled": True, "optimizer": optimizer}})
    assert FinetuneParams(optimizer=optimizer).optimizer == optimizer


@pytest.mark.parametrize(
    ("update", "match"),
    [
        ({"method": "qlora", "bits": 4}, r"quantize\.pooled is True; it should be false for method qlora"),
        ({"method": "loftq"}, "it should be false for method loftq"),
        ({"method": "rtn"}, "it should be false for method rtn"),
        ({"adapter": "dora"}, r"quantize\.adapter is 'dora'; it should be lora or rslora when pooled is true"),
        ({"start": "closed-form"}, r"quantize\.start is 'closed-form'; it should be default when pooled is true"),
    ],
)
def test_what_cannot_start_pooled_is_refused(update, match):
    with pytest.raises(ApiqError, match=match):
        parse({"quantize": {"pooled": True, **update}})


def test_an_option_that_makes_it_another_adapter_is_refused(full, windows, tmp_path):
    params = QuantizeParams(group_size=16, rank=4, epochs=1, pooled=True, adapter_options={"use_dora": True})
    with pytest.raises(ApiqError, match=r"quantize\.pooled is true, and the adapter on \S+ is not plain LoRA"):
        quantize(full, windows, params, tmp_path / "out")
