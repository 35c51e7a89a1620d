import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from apiq.errors import ApiqError
from apiq.evaluation.perplexity import perplexity

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture
def windows():
    return torch.randint(0, 29, (5, 12), generator=torch.Generator().manual_seed(0))


def test_uniform_model_has_the_perplexity_of_its_vocabulary(uniform, windows):
    assert perplexity(uniform, windows) == pytest.approx(29, rel=1e-6)


def test_certain_model_has_perplexity_one_on_what_it_knows_and_more_on_else(alphabet):
    known = torch.arange(0, 12)[None]
    assert perplexity(alphabet, known) == pytest.approx(1, abs=1e-6)
    assert perplexity(alphabet, known.flip(1)) > 1e6


def test_is_exp_of_the_mean_of_the_window_means(alphabet, windows):
    with torch.no_grad():
        logits = alphabet(input_ids=windows).logits
    means = [functional.cross_entropy(row[:-1], window[1:]).item() for row, window in zip(logits, windows, strict=True)]
    assert perplexity(alphabet, windows) == pytest.approx(math.exp(sum(means) / 5), rel=1e-6)


def test_does_not_depend_on_the_batch_size(alphabet, windows):
    assert perplexity(alphabet, windows, 1) == pytest.approx(perplexity(alphabet, windows, 4), rel=1e-6)


def test_reports_every_batch_and_leaves_the_mode_of_the_model(uniform, windows):
    steps = []
    uniform.train()
    perplexity(uniform, windows, 2, steps.append)
    assert [(step.done, step.total) for step in steps] == [(2, 5), (4, 5), (5, 5)]
    assert steps[-1].loss == pytest.approx(math.log(29))
    assert uniform.training


def test_names_the_window_that_is_not_finite(alphabet):
    windows = torch.arange(0, 12).repeat(3, 1)
    windows[1, 5] = 28
    with torch.no_grad():
        alphabet.model.embed_tokens.weight[28] = math.nan
    with pytest.raises(ApiqError, match="window 1 of 3"):
        perplexity(alphabet, windows, 3)


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        (torch.zeros(2, 65, dtype=torch.long), "65 tokens; the context of the model takes at most 64"),
        (torch.full((1, 4), 29), "token 29, and the model knows 29 tokens"),
        (torch.zeros(0, 4, dtype=torch.long), "at least one window"),
        (torch.zeros(3, 1, dtype=torch.long), "at least 2 tokens"),
    ],
)
def test_refuses_windows_that_cannot_be_scored(uniform, windows, reason):
    with pytest.raises(ApiqError, match=reason):
        perplexity(uniform, windows)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_what_predicts_no_next_token_is_refused(kind):
    config = BertConfig(vocab_size=29, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ApiqError, match=f"{kind.__name__} does not predict the next token"):
        perplexity(kind(config), torch.zeros(2, 8, dtype=torch.long))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and data are not on this machine")
def test_published_perplexity_of_babyllama():
    from pyarrow import parquet
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHARED / "models" / "babyllama-105"
    rows = parquet.read_table(SHARED / "data" / "tinystories" / "validation.parquet")["text"].to_pylist()
    tokens = AutoTokenizer.from_pretrained(folder)("\n".join(rows[:1000]), return_tensors="pt").input_ids[0]
    windows = tokens[: 200 * 256].view(200, 256)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert perplexity(model, windows, 8) == pytest.approx(2.0331, abs=0.0005)
