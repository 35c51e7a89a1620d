"""Finetuning of what quantization really writes."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from apiq.checkpoint.loading import load
from apiq.evaluation.run import compare
from apiq.finetuning.run import finetune
from apiq.layers.packed import PackedLinear
from apiq.params import EvaluateParams, EvaluationText, QuantizeParams
from apiq.quantization import quantize

# peft 0.21 itself asks transformers for this
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def packed(tokenizer, tmp_path_factory):
    """A model in 2 bits with adapters, beside the model it was made from."""
    folder = tmp_path_factory.mktemp("packed")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape)).save_pretrained(
        folder / "full"
    )
    tokenizer.save_pretrained(folder / "full")
    windows = torch.randint(1, 27, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APIQ_WORK", str(folder / "work"))
        quantize(folder / "full", windows, QuantizeParams(group_size=16, rank=4, epochs=1), folder / "quantized")
    return folder


def test_only_the_adapters_learn_and_evaluation_sees_it(packed, params, text):
    out = packed / "finetuned"
    result = finetune(packed / "quantized", params, out)
    assert not list(out.rglob("block-*"))
    loaded = load(out)
    names = [name for name, module in loaded.model.named_modules() if isinstance(module, PackedLinear)]
    assert len(names) == 14
    before = load_file(packed / "quantized" / "block-000.safetensors")
    now = loaded.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.codes
    assert torch.equal(now, before["model.layers.0.self_attn.q_proj.codes"])

    corpora = EvaluateParams(perplexity={"letters": EvaluationText(text=str(text), length=16)})
    models = {name: lambda name=name: load(packed / name) for name in ("full", "quantized", "finetuned")}
    found = {name: result["perplexity"]["letters"] for name, result in compare(models, corpora).items()}
    assert found["finetuned"] < 0.9 * found["quantized"]
    assert math.exp(result["held_out_loss_best"]) < 0.9 * math.exp(result["held_out_loss_first"])
