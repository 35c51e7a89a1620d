"""The model that was calibrated, the packed one in memory and the reloaded one are one function."""

import json
import shutil
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import apiq
import apiq.blocks.walk as walk_module
from apiq.blocks.architecture import replace
from apiq.checkpoint import loading
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.loading import load
from apiq.checkpoint.reading import linear, linear_names
from apiq.errors import ApiqError
from apiq.layers.fake_quant import FakeQuantLinear
from apiq.layers.packed import PackedLinear

CASES = [(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 32, 43, 64) for symmetric in (False, True)]
CASES += [(1, 32, "balanced"), (2, 43, "balanced"), (4, 0, "balanced"), (1.58, 43, False)]


@pytest.fixture
def calibrated(original, monkeypatch):
    """The full-precision model with the fitted blocks of calibration time in it, as quantize leaves them behind."""
    model = AutoModelForCausalLM.from_pretrained(original)
    deploy = walk_module.deploy

    def keep(block, solution, params, storage):
        index = len(kept)
        kept.append(block)
        for name, module in list(block.named_modules()):
            if isinstance(module, FakeQuantLinear):
                fakes[index, name.removesuffix(".base_layer")] = module
        return deploy(block, solution, params, storage)

    kept, fakes = [], {}
    monkeypatch.setattr(walk_module, "deploy", keep)
    return model, kept, fakes


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_fake_packed_and_reloaded_logits_agree(make, calibrated, windows, bits, group, symmetric):
    model, blocks, fakes = calibrated
    folder, _ = make(bits=bits, group_size=group, symmetric=symmetric)
    for index, block in enumerate(blocks):
        model.model.layers[index] = block
    with torch.no_grad():
        in_memory = model(windows).logits
        for (index, name), fake in fakes.items():
            replace(model.model.layers[index], f"{name}.base_layer", fake)
        calibration_time = model(windows).logits
        reloaded = load(folder, device="cpu").model(windows).logits
        by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")(
            windows
        ).logits
    assert len(fakes) == 14
    torch.testing.assert_close(in_memory, calibration_time, rtol=0, atol=1e-5)
    torch.testing.assert_close(reloaded, calibration_time, rtol=0, atol=1e-5)
    assert torch.equal(by_hand, reloaded)


def test_loading_asks_each_packed_linear_for_its_weight_once(make, windows, monkeypatch):
    folder, _ = make()
    expected = load(folder).model(windows).logits
    asked = Counter()
    dequantized = PackedLinear.dequantized

    def counted(self):
        asked[self] += 1
        return dequantized(self)

    monkeypatch.setattr(PackedLinear, "dequantized", counted)
    model = load(folder).model
    assert set(asked.values()) == {1}
    assert set(asked) == {module for module in model.modules() if isinstance(module, PackedLinear)}
    assert torch.equal(model(windows).logits, expected)


@pytest.mark.parametrize("limit", [2**24, 100])
def test_a_large_packed_model_leaves_no_freed_weights_in_the_heap(make, monkeypatch, limit):
    folder, _ = make()
    calls = []
    monkeypatch.setattr(loading, "give_back_freed", lambda: calls.append(True))
    monkeypatch.setattr(loading, "LIMIT", limit)
    load(folder, device="cpu")
    assert len(calls) == (limit == 100)


def test_adapters_matter_and_can_be_left_off(make, windows):
    folder, _ = make(epochs=3)
    with torch.no_grad():
        with_adapters = load(folder, device="cpu").model(windows).logits
        without = load(folder, device="cpu", adapters=False).model(windows).logits
    assert float((with_adapters - without).abs().max()) > 1e-3


def test_generation_and_half_precision(make, windows):
    folder, _ = make()
    model = load(folder, device="cpu", dtype="bfloat16").model
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14
    assert {module.scales.dtype for module in packed} == {torch.float16}
    assert model.generate(input_ids=windows[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_the_counted_bits_are_those_of_the_packing(make):
    folder, result = make(bits=3, group_size=32, rank=4)
    shapes = [(48, 48), (24, 48), (24, 48), (48, 48), (100, 48), (100, 48), (48, 100)]
    weights = sum(o * i for o, i in shapes)

    def words(columns, bits):
        return 32 * -(-columns * bits // 32)

    groups = [-(-i // 32) for _, i in shapes]
    expected = {
        "codes": sum(o * words(i, 3) for o, i in shapes) / weights,
        "scales": sum(o * g * 16 for (o, _), g in zip(shapes, groups, strict=True)) / weights,
        "zeros": sum(o * words(g, 3) for (o, _), g in zip(shapes, groups, strict=True)) / weights,
        "adapters": sum(4 * (o + i) * 32 for o, i in shapes) / weights,
    }
    bits = effective_bits(folder)
    assert bits.weights == 2 * weights
    for part, value in expected.items():
        assert getattr(bits, part) == pytest.approx(value)
    assert result["effective_bits"] == pytest.approx(sum(expected.values()))
    assert json.loads((folder / "metrics.json").read_text())["effective_bits"] == result["effective_bits"]


def test_a_single_linear_can_be_read(make, windows):
    folder, _ = make(group_size=43)
    names = linear_names(folder)
    assert len(names) == 14
    assert names[0].startswith("model.layers.0.")
    read = linear(folder, "model.layers.1.mlp.down_proj")
    module = load(folder, device="cpu").model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    assert torch.equal(read.Q, module.base_layer.dequantized())
    assert torch.equal(read.A, module.lora_A["default"].weight)
    assert read.scaling == module.scaling["default"] == 4.0
    with pytest.raises(ApiqError, match=r"no packed linear model\.nothing"):
        linear(folder, "model.nothing")


def test_equal_runs_give_equal_bytes(make):
    first, _ = make("first")
    second, _ = make("second")
    assert {p.name: p.read_bytes() for p in first.rglob("*") if p.is_file()} == {
        p.name: p.read_bytes() for p in second.rglob("*") if p.is_file()
    }
    text = (first / "adapter" / "adapter_config.json").read_text()
    assert str(first.parent) not in text


def test_another_seed_gives_other_adapters(make):
    first, second = (load_file(make(f"s{seed}", seed=seed)[0] / "adapter/adapter_model.safetensors") for seed in (0, 1))
    assert all(not torch.equal(first[key], second[key]) for key in first)


def test_rtn_needs_no_windows_and_carries_no_adapters(original, tmp_path, work):
    from apiq.params import QuantizeParams

    result = apiq.quantize(original, None, QuantizeParams(method="rtn", bits=4, group_size=16), tmp_path / "rtn")
    assert not (tmp_path / "rtn" / "adapter").exists()
    assert result["bits"]["adapters"] == 0
    assert len(result["blocks"]) == 2


def test_a_loaded_model_needs_its_folder_no_more(make):
    out, _ = make(method="rtn")
    loaded = apiq.load(out)
    shutil.rmtree(out)
    assert loaded.tokenizer("w3 w5").input_ids
    assert loaded.model(torch.tensor([[3, 5]])).logits.isfinite().all()


def test_a_packed_model_is_not_saved_as_a_folder_that_nothing_reads(make, tmp_path, caplog):
    loaded = load(make()[0])
    with pytest.raises(ValueError, match="not serializable"):
        loaded.model.get_base_model().save_pretrained(tmp_path / "saved")
    assert "copy the folder that it was loaded from" in caplog.text
    assert not (tmp_path / "saved").exists()
    loaded.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_it_is_compiled_placed_and_checkpointed_like_any_model_of_transformers(make, windows):
    """The backend without code generation: it traces as the others do and needs no compiler."""
    folder, _ = make()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    expected = plain(windows).logits
    torch.testing.assert_close(placed(windows).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.compile(plain, backend="aot_eager")(windows).logits, expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()
    gradients = []
    for checkpointing in (False, True):
        model = PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True).train()
        if checkpointing:
            plain.activation_checkpointing_enable()
            plain.enable_input_require_grads()
        model(input_ids=windows, labels=windows).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        plain = model.unload()
    assert len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
