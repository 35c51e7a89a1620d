"""A tiny random model of every family that is claimed to work, and how many linears its blocks have."""

from dataclasses import dataclass

import transformers as hf
from transformers import PretrainedConfig

WORDS, WIDTH, BLOCKS = 61, 32, 3
_DECODER = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
_ENCODER = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
_SPARSE = {**_DECODER, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
_QWEN_VISION = {
    "depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One family."""

    head: str
    """The transformers class that is loaded."""
    config: PretrainedConfig
    linears: int | tuple[int, ...]
    """Quantized linears in one block, or in each."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Quantized linears in each block."""
        return self.linears if isinstance(self.linears, tuple) else (self.linears,) * BLOCKS


def _rope(**sections):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sections}}


DECODERS = {
    "llama": Member("LlamaForCausalLM", hf.LlamaConfig(**_DECODER, tie_word_embeddings=True), 7),
    "mistral": Member("MistralForCausalLM", hf.MistralConfig(**_DECODER, sliding_window=8), 7),
    "qwen2": Member("Qwen2ForCausalLM", hf.Qwen2Config(**_DECODER), 7),
    "qwen3": Member("Qwen3ForCausalLM", hf.Qwen3Config(**_DECODER, head_dim=8), 7),
    "gemma2": Member("Gemma2ForCausalLM", hf.Gemma2Config(**_DECODER, head_dim=8, sliding_window=8), 7),
    "gemma3": Member(
        "Gemma3ForCausalLM", hf.Gemma3TextConfig(**_DECODER, head_dim=8, sliding_window=8, sliding_window_pattern=2), 7
    ),
    "phi3": Member("Phi3ForCausalLM", hf.Phi3Config(**_DECODER), 4),
    "opt": Member(
        "OPTForCausalLM",
        hf.OPTConfig(vocab_size=WORDS, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
                     max_position_embeddings=64, word_embed_proj_dim=WIDTH, pad_token_id=0, init_std=0.1), 6,
    ),
    "gpt_neox": Member("GPTNeoXForCausalLM", hf.GPTNeoXConfig(**_ENCODER), 4),
    "gpt2": Member(
        "GPT2LMHeadModel",
        hf.GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=64, pad_token_id=0,
                      initializer_range=0.1), 4,
    ),
    "mixtral": Member(
        "MixtralForCausalLM", hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2), 4 + 2 * 4
    ),
    "qwen2_moe": Member(
        "Qwen2MoeForCausalLM", hf.Qwen2MoeConfig(**_SPARSE, shared_expert_intermediate_size=40), 4 + 3 + 2 * 4
    ),
    "qwen3_moe": Member("Qwen3MoeForCausalLM", hf.Qwen3MoeConfig(**_SPARSE, head_dim=8), 4 + 2 * 4),
    "nemotron_h": Member(  # experts without a gate
        "NemotronHForCausalLM",
        hf.NemotronHConfig(**_DECODER, head_dim=8, hybrid_override_pattern="E*E", n_routed_experts=4,
                           num_experts_per_tok=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=40,
                           n_group=1, topk_group=1), (2 + 2 * 4, 4, 2 + 2 * 4),
    ),
    "olmo": Member("OlmoForCausalLM", hf.OlmoConfig(**_DECODER), 7),  # no parameters but weights
}  # fmt: skip
ENCODERS = {
    "bert": Member("BertForSequenceClassification", hf.BertConfig(**_ENCODER), 6),
    "roberta": Member("RobertaForMaskedLM", hf.RobertaConfig(**_ENCODER), 6),
    "deberta_v2": Member(
        "DebertaV2ForSequenceClassification",
        hf.DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16,
                           share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False), 6,
    ),
    "modernbert": Member(
        "ModernBertForMaskedLM",
        hf.ModernBertConfig(**_ENCODER, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2,
                            bos_token_id=1, eos_token_id=2), 4,
    ),
}  # fmt: skip
TOWERS = {
    "llava": Member(
        "LlavaForConditionalGeneration",
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_TOWER, image_size=8, patch_size=4, projection_dim=16),
            text_config=hf.LlamaConfig(**_DECODER), image_token_index=3,
        ), 7,
    ),
    "qwen2_vl": Member(
        "Qwen2VLForConditionalGeneration",
        hf.Qwen2VLConfig(
            vision_config=_QWEN_VISION,
            text_config={**_DECODER, **_rope(rope_type="default", mrope_section=[1, 1, 2])},
        ), 7,
    ),
}  # fmt: skip
ZOO = {**DECODERS, **ENCODERS, **TOWERS}
