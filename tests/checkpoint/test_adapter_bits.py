"""Adapters in few bits: counted as they are stored, read as they were rounded, given to others as PEFT's."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import apiq
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.adapter_file import PACKED, WHOLE, read_adapter
from apiq.checkpoint.loading import load
from apiq.checkpoint.reading import linear, linear_names
from apiq.errors import ApiqError
from apiq.files import sha256_folder
from apiq.grids.absmax import rounded


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
def test_what_is_stored_is_rounded_counted_and_read(make, tmp_path, windows, bits, adapter):
    folder, _ = make(adapter=adapter)
    out = tmp_path / "small"
    told = apiq.export(folder, out, "apiq", adapter_bits=bits)
    before, after = read_adapter(folder / "adapter"), read_adapter(out / "adapter")
    assert before.keys() == after.keys() and not (out / "adapter" / WHOLE).exists()
    for name, value in before.items():
        assert torch.equal(after[name], rounded(value, bits) if value.ndim > 1 else value)
    entries = {name: value for name, value in before.items() if value.ndim > 1}
    groups = sum(-(-value.numel() // 64) for value in entries.values())
    others = sum(32 * value.numel() for name, value in before.items() if name not in entries)
    counted = effective_bits(out)
    assert counted.adapters * counted.weights == pytest.approx(groups * (64 * bits + 16) + others)
    assert told["effective_bits"] == counted.total < effective_bits(folder).total
    whole = load(folder, device="cpu").model
    state = {name.replace(".weight", ".default.weight"): value for name, value in after.items()}
    missing = whole.load_state_dict(state, strict=False)
    if adapter == "lora":
        assert not missing.unexpected_keys
        with torch.no_grad():
            expected, got = whole(windows).logits, load(out, device="cpu").model(windows).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_one_linear_is_read_with_its_rounded_adapters(make, tmp_path):
    folder, _ = make()
    apiq.export(folder, tmp_path / "small", "apiq", adapter_bits=4)
    name = linear_names(folder)[0]
    assert torch.equal(linear(tmp_path / "small", name).A, rounded(linear(folder, name).A, 4))


def test_other_formats_get_them_as_peft_reads_them(make, tmp_path, windows):
    folder, _ = make()
    apiq.export(folder, tmp_path / "small", "apiq", adapter_bits=8)
    apiq.export(tmp_path / "small", tmp_path / "dense", "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    theirs = PeftModel.from_pretrained(model, tmp_path / "dense" / "adapter")
    with torch.no_grad():
        expected, got = load(tmp_path / "small", device="cpu").model(windows).logits, theirs(windows).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_same_bytes_twice_and_all_but_the_adapters_as_it_was(make, tmp_path):
    folder, _ = make()
    for name in ("a", "b"):
        apiq.export(folder, tmp_path / name, "apiq", adapter_bits=8)
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b")
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    assert (tmp_path / "a" / "adapter" / PACKED).exists()


def test_what_cannot_be_is_refused(make, tmp_path):
    folder, _ = make()
    with pytest.raises(ApiqError, match="--adapter-bits is 3; it should be 8, 4"):
        apiq.export(folder, tmp_path / "out", "apiq", adapter_bits=3)
    with pytest.raises(ApiqError, match="--adapter-bits for apiq"):
        apiq.export(folder, tmp_path / "out", "dense", adapter_bits=8)
    bare, _ = make("bare", method="rtn")
    with pytest.raises(ApiqError, match="has no adapters"):
        apiq.export(bare, tmp_path / "out", "apiq")
    assert not (tmp_path / "out").exists()
