from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiq.errors import ApiqError
from apiq.overrides import lay_over, read_yaml
from apiq.params import DemoModel, Params, parse
from apiq.recipes import RECIPES

ROOT = Path(__file__).parents[1]


def refusal(values: object) -> str:
    with pytest.raises(ApiqError) as caught:
        parse(values)  # type: ignore[arg-type]
    return str(caught.value)


def keys_of(values: dict) -> set[str]:
    return {
        f"{key}.{below}" if below else key
        for key, value in values.items()
        for below in (keys_of(value) if isinstance(value, dict) else {""})
    }


def test_params_yaml_parses_and_lists_every_key() -> None:
    written = read_yaml(ROOT / "params.yaml")
    assert keys_of(written) == keys_of(parse(written).model_dump())


def test_params_yaml_explains_every_key() -> None:
    for line in (ROOT / "params.yaml").read_text().splitlines():
        is_section = line and (not line.startswith(" ") or line == "    demo:")
        assert not line or is_section or "#" in line, line


def test_demo_model_of_params_yaml_is_the_default_one() -> None:
    assert parse(read_yaml(ROOT / "params.yaml")).model.demo == DemoModel()


def test_the_recipe_paper_has_the_numbers_of_the_paper() -> None:
    quantize = parse({"quantize": {"recipe": "paper"}}).quantize
    assert (quantize.bits, quantize.group_size, quantize.rank, quantize.epochs) == (2, 64, 64, 20)
    assert (quantize.lr_theta, quantize.decay_theta) == (0.005, 0.1)
    assert (quantize.lr_adapter, quantize.decay_adapter) == (0.0005, 0.1)
    finetune = Params().finetune
    assert finetune.batch_size * finetune.accumulation == 64


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({}, "closed-form"),
        ({"adapter": "lora", "start": "default"}, "default"),
        ({"adapter": "dora"}, "default"),
        ({"adapter_options": {"use_dora": True}}, "default"),
        ({"pooled": True}, "default"),
    ],
)
def test_fast_starts_plain_lora_at_the_closed_form_and_others_where_they_do(given: dict, start: str) -> None:
    assert parse({"quantize": {"recipe": "fast", **given}}).quantize.start == start


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fills_what_is_left_open_and_nothing_else(recipe: str) -> None:
    known = RECIPES[recipe]
    open_keys = parse({section: {"recipe": recipe, **dict.fromkeys(known[section])} for section in known})
    for section, values in known.items():
        assert {key: getattr(getattr(open_keys, section), key) for key in values} == values
    set_keys = parse({"quantize": {"recipe": recipe, "epochs": 7}, "refine": {"recipe": recipe, "generated": 3}})
    assert (set_keys.quantize.epochs, set_keys.refine.generated) == (7, 3)
    assert set_keys.quantize.ranges == known["quantize"]["ranges"]


def test_recipes_name_parameters_that_are_left_open_in_params_yaml() -> None:
    written = read_yaml(Path(__file__).parents[1] / "params.yaml")
    for recipe in RECIPES.values():
        for section, values in recipe.items():
            assert all(written[section][key] is None for key in values)


def test_parameters_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Params().quantize.bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"quantize": {"bits": 9}}, "quantize.bits is 9; it should be at least 1 and at most 8."),
        ({"quantize": {"bits": "2"}}, "quantize.bits is '2'; it should be a number."),
        ({"quantize": {"bits": True}}, "quantize.bits is True; it should be a number."),
        ({"quantize": {"lr_theta": 0}}, "quantize.lr_theta is 0; it should be more than 0 and at most 1."),
        ({"quantize": {"device": "gpu"}}, "quantize.device is 'gpu'; it should be auto, cpu, cuda, cuda:N or mps."),
        ({"quantize": {"method": "gtpq"}}, "quantize.method is 'gtpq'; it should be rtn,"),
        ({"quantize": {"method": "qlora", "bits": 8}}, "quantize.bits is 8; it should be 2 to 4 for the NormalFloat"),
        (
            {"quantize": {"method": "loftq", "adapter": "dora"}},
            "quantize.adapter is 'dora'; it should be lora for method",
        ),
        (
            {"quantize": {"start": "closed-form", "adapter": "ia3"}},
            "quantize.adapter is 'ia3'; it should be lora for s",
        ),
        (
            {"quantize": {"method": "closed-form", "adapter_options": {"use_rslora": True}}},
            "quantize.adapter_options is",
        ),
        (
            {"quantize": {"method": "qlora", "adapter": "pissa"}},
            "quantize.adapter is 'pissa'; it should be one that st",
        ),
        (
            {"quantize": {"method": "gptq", "gptq": {"damping": 0}}},
            "quantize.gptq.damping is 0; it should be more than",
        ),
        ({"quantize": {"method": "qlora", "symmetric": True}}, "quantize.symmetric is True; it should be false for"),
        (
            {"quantize": {"method": "gptq", "rounding": "soft"}},
            "quantize.rounding is 'soft'; it should be straight-through for method gptq",
        ),
        ({"quantize": {"method": "rtn", "held_out": 0.1}}, "quantize.held_out is 0.1; it should be 0 for method rtn"),
        ({"quantize": {"patience": 2}}, "quantize.patience is 2; it should be 0 when held_out is 0"),
        (
            {"quantize": {"method": "gptq", "lr_weight": 0.001}},
            "quantize.lr_weight is 0.001; it should be 0 for method gptq",
        ),
        ({"quantize": {"symmetric": "yes"}}, "quantize.symmetric is 'yes'; it should be false, true or balanced."),
        (
            {"quantize": {"method": "qlora", "symmetric": "balanced"}},
            "quantize.symmetric is 'balanced'; it should be false for",
        ),
        ({"quantize": {"bits": 1.5}}, "quantize.bits is 1.5; it should be a whole number from 1 to 8, or 1.58 (t"),
        ({"quantize": {"candidate_bits": [2, 1.6]}}, "quantize.candidate_bits.1 is 1.6; it should be a whole number"),
        ({"quantize": {"method": "loftq", "bits": 1.58}}, "quantize.bits is 1.58; it should be 2 to 4 for the Normal"),
        ({"quantize": {"bits": 1, "symmetric": True}}, "quantize.bits is 1; it should be at least 2 when symmetric"),
        ({"quantize": None}, "quantize is empty; it should be a section of key: value lines."),
        ({"quantize": {"bit": 3}}, "quantize.bit is not a parameter; did you mean bits?"),
        ({"quantise": {}}, "quantise is not a parameter; did you mean quantize?"),
        ({"quantize": {"xyz": 3}}, "quantize.xyz is not a parameter; known here are recipe, method, bits,"),
        ({3: {}}, "3 is not a parameter; keys are text."),
        ({"finetune": {"task": "instruction"}}, "finetune.pairs is empty; it should be a file when task is instr"),
        ({"finetune": {"text": ""}}, "finetune.text is ''; it should be one character or more."),
        ({"finetune": {"pairs": ""}}, "finetune.pairs is ''; it should be one character or more."),
        ({"finetune": {"epochs": float("nan")}}, "finetune.epochs is nan; it should be a finite number."),
        ({"model": {"demo": {"hidden_size": 64, "heads": 5}}}, "model.demo.heads is 5; it should be a divisor of"),
        ({"evaluate": {"tasks": "arc"}}, "evaluate.tasks is 'arc'; it should be a list, as in [a, b]."),
        (
            {"quantize": {"candidate_bits": []}},
            "quantize.candidate_bits is []; it should be a list of one entry or more.",
        ),
        (
            {"refine": {"activation_checkpointing": "yes"}},
            "refine.activation_checkpointing is 'yes'; it should be false, true or auto.",
        ),
        (
            {"quantize": {"target_bits": 2.5, "candidate_bits": [4, 3]}},
            "quantize.target_bits is 2.5; it should be more than 3, the least of candidate_bits",
        ),
        ({"refine": {"epochs": 0, "lr_scales": 0.01}}, "refine.lr_scales is 0.01; it should be 0 when epochs is 0: no"),
        (
            {"refine": {"recipe": "fast", "adapter_bits": 8}},
            "refine.adapter_bits is 8; it should be empty when epochs is 0: nothing is refined, as with the recipes",
        ),
        ({"evaluate": {"perplexity": {"a b": {"text": "demo"}}}}, "evaluate.perplexity.a b is not a name"),
        ({"evaluate": {"perplexity": {"a": {}}}}, "evaluate.perplexity.a.text is missing."),
        ({"evaluate": {"perplexity": {"a": {"text": "demo", "lenght": 3}}}}, "evaluate.perplexity.a.lenght is not a"),
    ],
)
def test_a_refusal_names_key_value_and_what_is_allowed(values: dict, told: str) -> None:
    sentence = refusal(values)
    assert sentence.startswith(told)
    assert "\n" not in sentence


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=5), below, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted(keys_of(Params().model_dump()))), ANYTHING)
def test_any_value_is_taken_or_refused_in_one_sentence(path: str, value: object) -> None:
    nested: object = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    try:
        parse(lay_over(Params().model_dump(), nested))  # type: ignore[arg-type]
    except ApiqError as error:
        assert path.split(".")[0] in str(error)
