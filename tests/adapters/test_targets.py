"""Which linears are found, from their names and shapes alone."""

import pytest

from apiq.adapters.targets import attention, feed_forward, outputs, select
from apiq.errors import ApiqError

LLAMA = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
PHI3 = {
    "self_attn.o_proj": (64, 64), "self_attn.qkv_proj": (128, 64),
    "mlp.gate_up_proj": (192, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
OPT = {
    "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64), "self_attn.q_proj": (64, 64),
    "self_attn.out_proj": (64, 64), "fc1": (256, 64), "fc2": (64, 256),
}  # fmt: skip
MIXTURE = {
    **{name: shape for name, shape in LLAMA.items() if "attn" in name},
    **{f"mlp.experts.{i}.{name}_proj": shape for i in range(2)
       for name, shape in {"gate_up": (192, 64), "down": (64, 96)}.items()},
}  # fmt: skip
MAMBA = {"mixer.in_proj": (256, 64), "mixer.out_proj": (64, 128)}


@pytest.mark.parametrize("block", [LLAMA, PHI3, OPT, MIXTURE])
def test_attention_and_feed_forward_part_the_block(block):
    assert attention(block) == [name for name in block if name.startswith("self_attn.")]
    assert select(block, ["attn", "ffn"]) == select(block, ["all"]) == list(block)
    assert not set(attention(block)) & set(feed_forward(block))


def test_names_and_ends_of_names_are_found_in_the_order_of_the_block():
    assert select(LLAMA, ["down_proj", "self_attn.q_proj"]) == ["self_attn.q_proj", "mlp.down_proj"]
    assert select(MIXTURE, ["down_proj"]) == ["mlp.experts.0.down_proj", "mlp.experts.1.down_proj"]


@pytest.mark.parametrize("part", ["attn", "ffn"])
def test_parts_of_a_block_without_attention_are_refused(part):
    with pytest.raises(ApiqError, match=rf"adapter_targets is {part}, .* names out of mixer.in_proj, mixer.out_proj"):
        select(MAMBA, [part])


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ApiqError, match=r"names query, which no linear .* self_attn\.q_proj"):
        select(LLAMA, ["q_proj", "query"])
    with pytest.raises(ApiqError, match="names proj"):
        select(LLAMA, ["proj"])


@pytest.mark.parametrize(
    ("block", "ends"),
    [
        (LLAMA, ["self_attn.o_proj", "mlp.down_proj"]),
        (PHI3, ["self_attn.o_proj", "mlp.down_proj"]),
        (OPT, ["self_attn.out_proj", "fc2"]),
        (MIXTURE, ["self_attn.o_proj"]),
        (MAMBA, []),
    ],
)
def test_the_linears_that_end_a_part(block, ends):
    assert outputs(block) == ends
