"""What PEFT is told, and what is refused before any work."""

import re
from typing import get_args

import pytest
from torch import nn

from apiq.adapters.configuration import block_config, model_config, resolved, targets
from apiq.adapters.injection import Adapters
from apiq.adapters.tuners import REFUSED, TUNERS
from apiq.errors import ApiqError
from apiq.params import parse
from apiq.quantize_params import Adapter

from .conftest import settings
from .test_targets import LLAMA, MAMBA, MIXTURE


def test_the_table_and_the_parameter_know_the_same_names():
    assert set(get_args(Adapter)) == {"none", *TUNERS}
    assert not set(TUNERS) & set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_tuner_that_cannot_be_used_is_refused_with_the_reason(name):
    with pytest.raises(ApiqError, match=f"quantize.adapter is '{name}'; it should be another one: .*{REFUSED[name]}"):
        parse({"quantize": {"adapter": name}})


def test_the_model_pattern_finds_the_targets_in_every_block_and_nothing_else():
    pattern = model_config(settings(adapter_targets=["attn"]), LLAMA, "model.layers").target_modules
    names = [f"model.layers.{i}.{name}" for i in (0, 11) for name in LLAMA]
    assert [name for name in names if re.fullmatch(pattern, name)] == [name for name in names if "attn" in name]
    assert not re.fullmatch(pattern, "model.layers.0.self_attn.q_proj.base_layer")
    assert not re.fullmatch(pattern, "model.layers.x.self_attn.q_proj")


@pytest.mark.parametrize(
    ("adapter", "field", "value"),
    [
        ("oft", "oft_block_size", 16),  # divides 64 and 96, and is at most the rank
        ("boft", "boft_block_size", 16),
        ("road", "group_size", 32),  # divides 64, 32 and 96
        ("vblora", "vector_length", 32),
        ("fourierft", "n_frequency", 20 * 96),
        ("c3a", "block_size", 2),  # no more parameters than LoRA on any linear
        ("osf", "rank_pattern", {r"(mlp\.down_proj)$": 44}),
        ("ia3", "feedforward_modules", r"(mlp\.down_proj)"),
    ],
)
def test_sizes_fit_every_linear(adapter, field, value):
    targets = ["down_proj"] if adapter == "osf" else ["all"]
    config = block_config(settings(adapter=adapter, rank=20, adapter_targets=targets), LLAMA)
    assert getattr(config, field) == value


def test_rank_is_bounded_where_it_is_the_rank_of_a_matrix():
    with pytest.raises(ApiqError, match=r"rank is 33; it must be at most 32, the smaller side of self_attn\.k_proj"):
        resolved(settings(rank=33), [LLAMA])
    resolved(settings(rank=33, adapter="loha"), [LLAMA])
    resolved(settings(rank=64, adapter_targets=["q_proj", "ffn"]), [LLAMA])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"adapter_options": {"use_dorra": True}}, "use_dorra is no option of PEFT's LoraConfig; did you mean"),
        ({"adapter_options": {"target_modules": "x"}}, "adapter_options.target_modules cannot be set: apiq itself"),
        ({"adapter_options": {"bias": "all"}}, "adapter_options.bias cannot be set"),
        ({"adapter_options": {"use_qalora": True}}, "use_qalora cannot be set: PEFT pools inputs on GPTQ"),
        ({"adapter_options": {"init_lora_weights": "eva"}}, "init_lora_weights is 'eva'; it should be gaussian"),
        ({"adapter_options": {"init_lora_weights": "pissa"}}, "init_lora_weights is 'pissa'; it should be gau"),
        ({"adapter": "oft", "adapter_options": {"oft_block_size": 8, "r": 3}}, "adapter is oft, and PEFT refuses"),
        ({"adapter": "houlsby", "adapter_options": {"act_fn": "x"}}, "and PEFT refuses it here: act_fn is 'x'"),
    ],
)  # fmt: skip
def test_options_are_refused_by_name(values, told):
    with pytest.raises(ApiqError, match=re.escape(told)):
        block_config(settings(**values), LLAMA)


def test_options_reach_peft():
    assert block_config(settings(adapter_options={"use_dora": True}), LLAMA).use_dora
    started = settings(adapter="pissa", adapter_options={"init_lora_weights": "pissa_niter_4"})
    assert block_config(started, LLAMA, start=True).init_lora_weights == "pissa_niter_4"
    assert block_config(started, LLAMA).init_lora_weights is True


def test_houlsby_stands_behind_the_parts_or_where_it_is_told_to():
    assert targets(settings(adapter="houlsby"), LLAMA) == ["self_attn.o_proj", "mlp.down_proj"]
    assert targets(settings(adapter="houlsby", adapter_targets=["ffn"]), LLAMA) == ["mlp.down_proj"]
    assert targets(settings(adapter="houlsby", adapter_targets=["v_proj"]), LLAMA) == ["self_attn.v_proj"]
    assert targets(settings(adapter="houlsby"), MIXTURE) == ["self_attn.o_proj"]
    for values, block in (({"adapter_targets": ["ffn"]}, MIXTURE), ({}, MAMBA)):
        with pytest.raises(ApiqError, match="end the attention and the feed-forward part, and none is found"):
            targets(settings(adapter="houlsby", **values), block)


def test_targets_are_spelled_out_for_blocks_that_differ():
    convolution = {"conv.in_proj": (192, 64), "mlp.gate_proj": (96, 64), "mlp.down_proj": (64, 96)}
    params = resolved(settings(adapter_targets=["attn", "down_proj"]), [LLAMA, convolution])
    assert params.adapter_targets == [name for name in LLAMA if "attn" in name] + ["mlp.down_proj"]
    assert targets(params, convolution, strict=False) == ["mlp.down_proj"]
    params = resolved(settings(adapter_targets=["attn"]), [LLAMA, convolution])
    assert targets(params, convolution, strict=False) == []


@pytest.mark.parametrize("adapter", ["vera", "oft", "osf", "ia3"])
def test_a_config_that_would_not_be_the_same_in_all_blocks_is_refused(adapter):
    other = {**LLAMA, "mlp.down_proj": (64, 56)}
    if adapter == "ia3":  # no attention to tell a feed-forward part from
        other = {"conv.in_proj": (192, 64), "mlp.down_proj": (64, 96)}
    resolved(settings(adapter=adapter, rank=16), [LLAMA, LLAMA])
    resolved(settings(adapter="lora", rank=16), [LLAMA, other])
    with pytest.raises(ApiqError, match=f"adapter is {adapter}, which needs the same linears in all blocks"):
        resolved(settings(adapter=adapter, rank=16), [LLAMA, other])


def test_a_rank_of_its_own_reaches_the_linear_whose_name_ends_another():
    """BERT has output.dense in the block, and attention.output.dense; the feed-forward part carries nothing here."""
    names = ("attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense")
    block, shapes = nn.Module(), {name: (24, 24) for name in names}
    for name in names:
        parent = block
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(24, 24))
    params = settings(adapter_targets=list(names[:3]), rank=4, alpha=8.0)
    wanted = dict(zip(names, (8, 6, 2, 5), strict=True))
    Adapters(block, params, shapes, seed=0, ranks=wanted)
    found = {name: module.r["default"] for name, module in block.named_modules() if hasattr(module, "lora_A")}
    assert found == {name: wanted[name] for name in names[:3]}


@pytest.mark.parametrize(
    ("values", "scaling"),
    [({}, 2.0), ({"adapter": "rslora"}, 4.0), ({"adapter": "lora", "adapter_options": {"use_rslora": True}}, 4.0)],
)
def test_the_scaling_of_every_rank_is_that_of_rank(values, scaling):
    params = settings(rank=4, alpha=8.0, **values)
    config = block_config(params, LLAMA, ranks={name: 2 + 3 * index for index, name in enumerate(LLAMA)})
    power = 0.5 if config.use_rslora else 1.0
    scalings = [config.alpha_pattern[key] / rank**power for key, rank in config.rank_pattern.items()]
    assert [config.lora_alpha / config.r**power, *scalings] == pytest.approx([scaling] * len(LLAMA))
