"""A rank for each linear: adapters stay within their size, and PEFT, readers and later phases find the ranks."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import apiq
from apiq.checkpoint.accounting import effective_bits
from apiq.checkpoint.loading import load
from apiq.checkpoint.reading import linear, linear_names
from apiq.errors import ApiqError
from apiq.files import read_json
from apiq.params import QuantizeParams, RefineParams
from apiq.refinement.run import refine

WANTED = {
    "target_bits": 3.7, "candidate_group_sizes": [16, 32], "candidate_ranks": [1, 3, 6], "rank": 4, "alpha": 8.0,
}  # fmt: skip


def ranks(model):
    """Rank and scaling of every LoRA by the name of its linear."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], round(module.scaling["default"], 9))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    "values",
    [
        {"method": "apiq-bw", "start": "closed-form"},
        {"method": "apiq-lw", "adapter": "rslora", "pooled": True},
        {"method": "closed-form"},
        {"method": "loftq"},
        {"method": "lq-lora"},
        {"method": "gptq-lora", "adapter": "dora"},
    ],
    ids=lambda values: values["method"],
)
def test_grids_and_ranks_share_a_budget_and_the_scaling_stays(make, values):
    folder, _ = make(**WANTED, **values)
    model = effective_bits(folder)
    assert 3.7 - 0.25 < model.codes + model.scales + model.zeros <= 3.7
    even = effective_bits(make("even", method="gptq-lora", rank=4, adapter=values.get("adapter", "lora"))[0])
    assert 0.85 * even.adapters < model.adapters <= even.adapters
    scaling = 8.0 / (4**0.5 if values.get("adapter") == "rslora" else 4)
    found = ranks(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter"))
    assert len({rank for rank, _ in found.values()}) > 1
    assert {share for _, share in found.values()} == {scaling}
    config = read_json(folder / "adapter" / "adapter_config.json")
    assert config["r"] == max(rank for rank, _ in found.values())
    for name in linear_names(folder) if values.get("adapter") != "dora" else ():
        stored = linear(folder, name)
        assert (len(stored.A), pytest.approx(stored.scaling)) == (found[name][0], scaling)


def test_later_phases_keep_the_ranks(make, original, windows, tmp_path):
    folder, _ = make(method="gptq-lora", **WANTED)
    kept = ranks(load(folder).model)
    low, high = (bound(rank for rank, _ in kept.values()) for bound in (min, max))
    assert f"rank | {low} to {high} |" in (folder / "README.md").read_text()
    refine(folder, original, windows, RefineParams(epochs=1, generated=0), tmp_path / "refined")
    loaded = load(tmp_path / "refined").model
    assert ranks(loaded) == kept
    apiq.export(tmp_path / "refined", tmp_path / "small", "apiq", adapter_bits=8)
    assert ranks(load(tmp_path / "small").model) == kept
    apiq.merge(tmp_path / "refined", tmp_path / "merged")
    with torch.no_grad():
        merged = load(tmp_path / "merged").model(input_ids=windows).logits
        torch.testing.assert_close(merged, loaded(input_ids=windows).logits, atol=1e-4, rtol=1e-4)


def test_ranks_alone_are_divided(make):
    folder, _ = make(method="gptq-lora", **{**WANTED, "target_bits": None})
    assert "exceptions" not in read_json(folder / "config.json")["quantization_config"]
    assert len({rank for rank, _ in ranks(load(folder).model).values()}) > 1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"method": "rtn"}, r"candidate_ranks\|\[1, 3, 6\]\|empty where there are no adapters"),
        ({"rank": 1, "candidate_ranks": [2, 3]}, r"candidate_ranks\|\[2, 3\]\|one of them at most rank, 1"),
        ({"adapter": "loha"}, r"adapter\|'loha'\|lora, rslora or dora with candidate_ranks"),
    ],
)
def test_what_has_no_rank_for_each_linear_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        QuantizeParams(**{**WANTED, **values})


def test_a_rank_above_the_side_of_a_linear_is_refused(make):
    with pytest.raises(ApiqError, match=r"candidate_ranks is 999; it must be at most"):
        make(**{**WANTED, "candidate_ranks": [1, 999]})
