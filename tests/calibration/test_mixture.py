import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apiq.calibration.leakage import sample_clean_windows
from apiq.calibration.mixture import counts, draw_windows
from apiq.calibration.windows import sample_windows, tokenize
from apiq.errors import ApiqError
from apiq.params import CalibrationParams, parse

NAMES = ("a", "b", "c")


@pytest.fixture
def tokenizer():
    """A token for each character."""
    characters = Tokenizer(models.WordLevel({letter: ord(letter) - 97 for letter in "abcdefghi"}, unk_token="a"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters)


@pytest.fixture
def corpora(tmp_path):
    """Three texts that have no letter in common, and so no token."""
    paths = [tmp_path / f"{name}.txt" for name in NAMES]
    for path, letters in zip(paths, ("abc", "def", "ghi"), strict=True):
        path.write_text(letters * 100)
    return [str(path) for path in paths]


def test_one_corpus_alone_gives_what_plain_sampling_does(tokenizer, corpora):
    chosen = CalibrationParams(corpus=corpora[0], windows=7, length=5, seed=3)
    windows, (origin,) = draw_windows(chosen, tokenizer)
    tokens = tokenize("abc" * 100, tokenizer)
    assert torch.equal(windows, sample_windows(tokens, 7, 5, torch.Generator().manual_seed(3)))
    assert (origin["name"], origin["tokens"], origin["windows"]) == (corpora[0], 300, 7)


def test_every_window_is_of_one_corpus_and_steps_see_all_of_them(tokenizer, corpora):
    chosen = CalibrationParams(corpus=corpora[0], mixture=[corpora[1], corpora[2], corpora[1]], windows=42, length=5)
    read = []
    windows, origins = draw_windows(chosen, tokenizer, reading=read.append)
    kinds = windows // 3
    assert (kinds == kinds[:, :1]).all()
    assert kinds[:, 0].bincount().tolist() == [11, 21, 10] == [origin["windows"] for origin in origins]
    assert len(set(kinds[:8, 0].tolist())) > 1, "in random order"
    assert read == corpora
    assert torch.equal(windows, draw_windows(chosen, tokenizer)[0])
    assert not torch.equal(windows, draw_windows(chosen.model_copy(update={"seed": 1}), tokenizer)[0])


def test_windows_that_repeat_evaluated_text_are_left_out_of_each(tokenizer, corpora):
    evaluated = {"b": tokenize("def" * 20, tokenizer)}
    chosen = CalibrationParams(corpus=corpora[0], mixture=[corpora[1]], windows=8, length=60)
    with pytest.raises(ApiqError, match=r"repeat 50 tokens or more of evaluated text \(b\)"):
        draw_windows(chosen, tokenizer, lambda *drawn: sample_clean_windows(*drawn, evaluated)[0])


def test_windows_are_divided_evenly_and_the_first_get_what_is_left():
    assert counts(CalibrationParams(corpus="c4", mixture=["pile", "ptb"], windows=8)) == {"c4": 3, "pile": 3, "ptb": 2}
    with pytest.raises(ApiqError, match=r"calibration\.windows is 2; it should be at least 3, one of each corpus"):
        parse({"calibration": {"corpus": "c4", "mixture": ["pile", "ptb"], "windows": 2}})
