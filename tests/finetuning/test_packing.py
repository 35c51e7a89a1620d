import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from apiq.errors import ApiqError
from apiq.finetuning.examples import IGNORED, Examples, answer_only, collate, whole
from apiq.finetuning.packing import collate_packed, pack, refuse_what_mixes
from apiq.finetuning.trainer import AdapterTrainer
from apiq.params import FinetuneParams
from apiq.progress import silent

EXAMPLES = [answer_only(list(range(1, 1 + a)), list(range(5, 5 + b)), 16) for a, b in ((3, 2), (1, 4), (2, 9), (4, 1))]


SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **SHAPE, initializer_range=0.5, use_cache=False)).train()


def llava():
    """Its cache is switched on in the part of its configuration that is of the text."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SHAPE, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(vocab_size=16, **SHAPE, initializer_range=0.5)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=15))


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.5, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_loss_and_gradients_are_those_of_the_examples_apart(make):
    found = []
    for batch in (collate(EXAMPLES), collate_packed(pack(EXAMPLES, 12))):
        model = make()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), torch.cat([value.grad.flatten() for value in model.parameters()])))
    (apart, gradient), (packed, packed_gradient) = found
    assert packed == pytest.approx(apart, abs=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_two_examples_share_a_sequence_and_the_shorter_one_is_filled_up():
    rows = pack([whole([1, 2]), whole([3, 4, 5, 6]), whole([7])], 4)
    assert rows == [
        {"input_ids": [3, 4, 5, 6], "labels": [IGNORED, 4, 5, 6], "position_ids": [0, 1, 2, 3]},
        {"input_ids": [1, 2, 7], "labels": [IGNORED, 2, IGNORED], "position_ids": [0, 1, 0]},
    ]
    batch = collate_packed(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}  # with a mask transformers would not look at positions
    assert batch["position_ids"].tolist()[1] == [0, 1, 0, 0]
    assert batch["labels"].tolist()[1] == [IGNORED, 2, IGNORED, IGNORED]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=30))
def test_every_example_is_in_one_sequence_and_none_is_needless(sizes):
    rows = pack([whole([number] * size) for number, size in enumerate(sizes)], 10)
    tokens = sorted(token for row in rows for token in row["input_ids"])
    assert tokens == sorted(number for number, size in enumerate(sizes) for _ in range(size))
    filled = sorted(len(row["input_ids"]) for row in rows)
    assert filled[-1] <= 10
    assert len(rows) == 1 or filled[0] + filled[1] > 10  # else the two would be one


def test_models_that_read_positions_are_taken():
    for make in (llama, gpt2):
        model = make()
        refuse_what_mixes(model, torch.device("cpu"))
        assert model.training


def test_the_probe_makes_the_call_of_the_training():
    with pytest.raises(ApiqError, match="in a LlavaForConditionalGeneration the examples of one sequence"):
        refuse_what_mixes(llava(), torch.device("cpu"))  # with a cache transformers does not look at positions


# peft 0.21 itself asks transformers for this
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_trainer_does_not_mix_examples_in_a_model_of_text_and_images(tmp_path):
    examples, params = Examples(EXAMPLES, EXAMPLES, {}, {}), FinetuneParams(text="demo", length=12, device="cpu")
    model = get_peft_model(llava(), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    apart = AdapterTrainer(model, examples, params, tmp_path, silent).held_out_loss()
    packed = Examples(pack(EXAMPLES, 12), pack(EXAMPLES, 12), {}, {})
    params = params.model_copy(update={"packing": True})
    assert AdapterTrainer(model, packed, params, tmp_path, silent).held_out_loss() == pytest.approx(apart, abs=1e-5)


def test_a_model_that_does_not_is_refused():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5))
    with pytest.raises(ApiqError, match="in a BloomForCausalLM the examples of one sequence would see each other"):
        refuse_what_mixes(model, torch.device("cpu"))
