"""A tiny Llama with widths that engines like, biases and a tied head; its checkpoints; what two models must share."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.checkpoint.loading import load
from apiq.params import QuantizeParams
from apiq.quantization import quantize

VOCABULARY = 61


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.15, tie_word_embeddings=True,
        attention_bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def windows():
    return torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def checkpoint(original, windows, tmp_path_factory):
    """The folder of the tiny model, or another, quantized with the given parameters; the same ones give the same."""
    made = {}

    def make(model=original, **values):
        key = str(model) + repr(sorted(values.items()))
        if key not in made:
            home = tmp_path_factory.mktemp("checkpoint")
            params = QuantizeParams(**{"method": "rtn", "bits": 4, "group_size": 32, "rank": 4, "epochs": 1, **values})
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("APIQ_WORK", str(home / "work"))
                quantize(model, windows if params.calibrated else None, params, home / "quantized")
            made[key] = home / "quantized"
        return made[key]

    return make


@pytest.fixture(scope="session")
def agree(windows):
    """Assert that a model gives our logits in float32, and after a prompt the 20 tokens that ours gives."""

    def agree(folder, theirs, dtype="float32", adapters=False, tolerance=1e-5):
        """`dtype` is that in which theirs was stored; both compute in the precision of `theirs`."""
        ours = load(folder, device="cpu", dtype=dtype, adapters=adapters).model.to(theirs.dtype)
        with torch.no_grad():
            expected, got = ours(windows).logits, theirs(windows).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
        assert expected.std() > 0.1
        how = {"input_ids": windows[:1, :4], "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        assert ours.generate(**how).tolist() == theirs.generate(**how).tolist()

    return agree
