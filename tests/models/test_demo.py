import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apiq.calibration import demo_corpus
from apiq.calibration.corpora import load_corpus
from apiq.calibration.windows import consecutive_windows, tokenize
from apiq.evaluation.perplexity import perplexity
from apiq.files import sha256, sha256_folder
from apiq.models.demo import train_demo
from apiq.models.source import fetch, locate
from apiq.params import DemoModel, ModelParams

TINY = DemoModel(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    layers=1,
    heads=2,
    kv_heads=1,
    context=32,
    steps=3,
    batch_size=4,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module", autouse=True)
def _little_text():
    """A tenth of the corpus: what is tested here does not depend on its size."""
    documents = demo_corpus.documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_corpus, "documents", lambda split: documents(split)[::10])
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A demo model of three steps, what it said on the way, and the random state before it began."""
    folder, said = tmp_path_factory.mktemp("demo") / "model", []
    torch.manual_seed(11)
    before = torch.get_rng_state()
    facts = fetch(ModelParams(source="demo", demo=TINY), folder, said.append)
    return folder, facts, said, torch.equal(before, torch.get_rng_state())


def test_the_same_parameters_give_the_same_bytes(trained, tmp_path):
    threads = torch.get_num_threads()
    train_demo(TINY, tmp_path / "again")
    assert sha256_folder(tmp_path / "again") == sha256_folder(trained[0])
    assert torch.get_num_threads() == threads


def test_another_seed_gives_other_weights(trained, tmp_path):
    train_demo(TINY.model_copy(update={"seed": 1, "steps": 1}), tmp_path / "other")
    assert sha256(tmp_path / "other" / "model.safetensors") != sha256(trained[0] / "model.safetensors")
    assert sha256(tmp_path / "other" / "tokenizer.json") == sha256(trained[0] / "tokenizer.json")


def test_the_random_state_of_the_process_is_left_alone(trained):
    assert trained[3]


def test_progress_tells_step_and_loss(trained):
    training = [step for step in trained[2] if step.phase == "training"]
    assert [(step.done, step.total) for step in training] == [(1, 3), (2, 3), (3, 3)]
    assert training[0].loss == pytest.approx(math.log(TINY.vocab_size), rel=0.05)
    assert training[-1].loss < training[0].loss


def test_the_folder_is_a_model_in_hugging_face_format(trained):
    folder = locate(trained[0])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.bos_token_id == tokenizer.bos_token_id == tokenizer("x")["input_ids"][0]
    assert model.config.max_position_embeddings == tokenizer.model_max_length == TINY.context
    text = "Return  the é value.\n\n    >>> 😀\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_loss_on_record_is_that_of_the_held_out_split(trained):
    folder, facts, *_ = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    held_out = load_corpus("demo:validation", split="train")
    windows = consecutive_windows(tokenize(held_out.text, tokenizer), 0, TINY.context)
    assert facts["training"]["held_out_loss"] == pytest.approx(math.log(perplexity(model, windows, 64)), abs=1e-5)
    assert facts["training"]["held_out"]["sha256"] == held_out.sha256
    assert facts["files"]["model.safetensors"] == sha256(folder / "model.safetensors")


def test_an_interrupted_training_leaves_nothing(tmp_path):
    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_demo(TINY, tmp_path / "model", interrupt)
    assert not list(tmp_path.iterdir())
