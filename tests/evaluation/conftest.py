"""A model whose every prediction is known: after a letter comes the next letter of the alphabet."""

import string

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", *string.ascii_lowercase, "</s>", "<unk>"]  # <s> is followed by a, z by </s>


@pytest.fixture(scope="session")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_model(head):
    """A Llama whose blocks add nothing, so that its logits are head @ norm(embedding)."""
    size = len(WORDS)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=64, **shape))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 32))
        model.lm_head.weight.copy_(head)
    return model.eval()


@pytest.fixture
def uniform():
    """All tokens are equally likely."""
    return make_model(torch.zeros(len(WORDS), 32))


@pytest.fixture
def alphabet():
    """The next letter is all but certain."""
    return make_model(4 * torch.eye(len(WORDS), 32).roll(1, dims=0))
