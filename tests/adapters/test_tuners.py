"""Every adapter: it trains, it undoes more than ranges alone do, and what is loaded is what was trained."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import apiq
from apiq.adapters.tuners import TUNERS
from apiq.params import FinetuneParams


def logits(model, windows):
    with torch.no_grad():
        return model(windows).logits


OWN_RATE = {"waveft": 0.001}
"""Learning rates of tuners whose parameters are on another scale than those of LoRA."""


def made_with(make, adapter, **values):
    return make(adapter=adapter, lr_adapter=OWN_RATE.get(adapter, 0.01), **values)


@pytest.mark.parametrize("adapter", TUNERS)
def test_block_loss_is_below_that_of_the_quantizer_alone(make, adapter):
    alone, rounded = make(adapter="none").losses[0], make(method="rtn").losses[0]
    assert made_with(make, adapter).losses[0] < alone < rounded


@pytest.mark.parametrize("adapter", TUNERS)
def test_what_is_loaded_is_what_was_trained(make, windows, adapter):
    made = made_with(make, adapter)
    trained = logits(made.fitted, windows)
    loaded = apiq.load(made.folder, device="cpu").model
    torch.testing.assert_close(logits(loaded, windows), trained, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(made.folder)
    by_hand = PeftModel.from_pretrained(base, made.folder / "adapter")
    torch.testing.assert_close(logits(by_hand, windows), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", TUNERS)
def test_finetuning_starts_from_there_and_is_saved_and_loaded(make, windows, adapter, tmp_path):
    made = made_with(make, adapter)
    model = apiq.load(made.folder, device="cpu", trainable=True).model.eval()
    start = logits(model, windows)
    torch.testing.assert_close(start, logits(made.fitted, windows), rtol=0, atol=1e-5)
    opened = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=windows, labels=windows).loss.backward()
    with torch.no_grad():
        for parameter in opened:
            parameter.sub_(0.01 * parameter.grad.sign())
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(made.folder)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert not torch.allclose(logits(model, windows), start)
    torch.testing.assert_close(logits(again, windows), logits(model, windows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", ["adalora", "houlsby", "hra", "vera"])
def test_finetuning_lowers_the_cross_entropy(make, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    (tmp_path / "text.txt").write_text("w3 w5 w7 w11 w13 w17 " * 40)
    params = FinetuneParams(
        text=str(tmp_path / "text.txt"), length=12, epochs=2, batch_size=4, accumulation=1, learning_rate=0.01,
        checkpoints=1, device="cpu",
    )  # fmt: skip
    made = made_with(make, adapter)
    metrics = apiq.finetune(made.folder, params, tmp_path / "tuned")
    assert metrics["held_out_loss_best"] < metrics["held_out_loss_first"]
    held = torch.tensor([[3, 5, 7, 11, 13, 17] * 2])
    tuned = apiq.load(tmp_path / "tuned", device="cpu").model.get_base_model()
    loss, before = (model(input_ids=held, labels=held).loss for model in (tuned, made.fitted))
    assert loss < before


@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa", "hra", "houlsby", "vera"])
def test_layer_by_layer_does_the_same(make, windows, adapter):
    made = made_with(make, adapter, method="apiq-lw")
    assert made.losses[0] < make(adapter="none", method="apiq-lw").losses[0]
    loaded = apiq.load(made.folder, device="cpu").model
    torch.testing.assert_close(logits(loaded, windows), logits(made.fitted, windows), rtol=0, atol=1e-5)
