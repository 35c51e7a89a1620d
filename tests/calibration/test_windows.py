import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from apiq.calibration import windows
from apiq.calibration.corpora import load_corpus
from apiq.errors import ApiqError

SHARED = Path(__file__).resolve().parents[3] / "shared"
PROSE = "The quick brown fox jumps over the lazy dog, returns a tuple; raises ValueError otherwise.\n\n    >>> x = 3\n"


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([PROSE], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", model_max_length=64)


def test_one_leading_token_for_the_whole_text(tokenizer):
    tokens = windows.tokenize(PROSE * 3, tokenizer)
    assert tokens.dtype == torch.long
    assert tokens[0] == tokenizer.bos_token_id
    assert (tokens == tokenizer.bos_token_id).sum() == 1
    assert tokenizer.decode(tokens[1:]) == PROSE * 3


def test_windows_of_an_encoder_stand_between_its_special_tokens(tokenizer):
    assert windows.frame(tokenizer) == ([], [])  # one leading token alone is that of a decoder
    encoder = copy.deepcopy(tokenizer)
    encoder.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ends = [(name, encoder.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    encoder.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    frame = windows.frame(encoder)
    assert frame == ([ends[0][1]], [ends[1][1]]) and frame.inside(5) == 3
    with pytest.raises(ApiqError, match=r"calibration\.length is 2,.* at least 3"):
        frame.inside(2)
    framed = frame.around(torch.arange(6).view(2, 3))
    assert framed.tolist() == [[ends[0][1], 0, 1, 2, ends[1][1]], [ends[0][1], 3, 4, 5, ends[1][1]]]
    assert windows.tokenize(PROSE, encoder).tolist() == encoder(PROSE)["input_ids"]


def test_a_text_beyond_the_context_is_not_cut_and_gives_no_warning(tokenizer, caplog, recwarn):
    assert len(windows.tokenize(PROSE * 40, tokenizer)) > tokenizer.model_max_length
    assert not caplog.records and not recwarn.list


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(
        st.sampled_from([*PROSE.split(), "\n", "\n\n", "é", "日本", "   ", "😀", "==="]), min_size=300, max_size=900
    )
)
def test_pieces_sewn_together_are_the_tokens_of_the_whole(tokenizer, words):
    text = " ".join(words)
    whole = tokenizer(text, verbose=False)["input_ids"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "PIECE", 500)
        patch.setattr(windows, "OVERLAP", 400)
        patch.setattr(windows, "BATCH", 3)
        assert windows.tokenize(text, tokenizer).tolist() == whole


def test_pieces_that_disagree_are_given_up_for_one_call(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "PIECE", 500)
    monkeypatch.setattr(windows, "OVERLAP", 20)
    assert windows._sewn(PROSE * 30, tokenizer) is None
    assert windows.tokenize(PROSE * 30, tokenizer).tolist() == tokenizer(PROSE * 30, verbose=False)["input_ids"]


@given(size=st.integers(2, 400), windows_=st.integers(1, 20), length=st.integers(2, 60), seed=st.integers(0, 2**31))
def test_sampled_windows_are_slices_of_the_text_and_repeat_with_the_seed(size, windows_, length, seed):
    tokens = torch.arange(size)
    if size < length:
        with pytest.raises(ApiqError, match=f"{size} tokens.*{length}"):
            windows.sample_windows(tokens, windows_, length, torch.Generator())
        return
    drawn = windows.sample_windows(tokens, windows_, length, torch.Generator().manual_seed(seed))
    assert drawn.shape == (windows_, length)
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(length))
    assert torch.equal(drawn, windows.sample_windows(tokens, windows_, length, torch.Generator().manual_seed(seed)))


def test_every_start_can_be_drawn():
    drawn = windows.sample_windows(torch.arange(10), 500, 8, torch.Generator().manual_seed(0))
    assert set(drawn[:, 0].tolist()) == {0, 1, 2}


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    windows.sample_windows(torch.arange(50), 5, 8, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@given(size=st.integers(1, 400), asked=st.integers(0, 20), length=st.integers(2, 60))
def test_consecutive_windows_are_the_beginning_of_the_text(size, asked, length):
    tokens = torch.arange(size)
    if size < length:
        with pytest.raises(ApiqError, match="fewer than one window"):
            windows.consecutive_windows(tokens, asked, length)
        return
    taken = windows.consecutive_windows(tokens, asked, length)
    assert len(taken) == (min(asked, size // length) if asked else size // length)
    assert torch.equal(taken.flatten(), tokens[: taken.numel()])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the models and data beside the repository are not here")
def test_full_precision_perplexity_of_babyllama_by_the_protocol():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHARED / "models" / "babyllama-105"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    corpus = load_corpus(str(SHARED / "data" / "tinystories" / "validation.parquet"), split="test")
    tokens = windows.tokenize(corpus.text, tokenizer)
    first = windows.consecutive_windows(tokens, 200, 256)
    assert tokens[0] == tokenizer.bos_token_id and first.shape == (200, 256)
    with torch.inference_mode():
        losses = [model(input_ids=window[None], labels=window[None]).loss for window in first]
    assert torch.stack(losses).mean().exp().item() == pytest.approx(2.0331, abs=5e-4)
