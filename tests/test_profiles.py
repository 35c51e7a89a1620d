import shutil
from pathlib import Path

import pytest

from apiq.errors import ApiqError
from apiq.params import Params
from apiq.profiles import change, known_profiles, lay

ROOT = Path(__file__).parents[1]
PROFILES = sorted(known_profiles(ROOT / "params.yaml"))


@pytest.fixture
def params_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "params.yaml"


# Table A.2: lr and weight decay of Theta, lr and weight decay of A and B. Table A.5: lr on WikiText-2.
TABLE = {
    "llama2-7b-4bit": ("meta-llama/Llama-2-7b-hf", 4, 0.05, 0.001, 0.0001, 0.1, 3e-4),
    "llama2-7b-3bit": ("meta-llama/Llama-2-7b-hf", 3, 0.001, 0.1, 0.0005, 0.0, 3e-4),
    "llama2-7b-2bit": ("meta-llama/Llama-2-7b-hf", 2, 0.005, 0.1, 0.0005, 0.1, 3e-4),
    "llama2-13b-2bit": ("meta-llama/Llama-2-13b-hf", 2, 0.005, 0.1, 0.0005, 0.1, 3e-4),
    "mistral-7b-2bit": ("mistralai/Mistral-7B-v0.1", 2, 0.005, 0.1, 0.0005, 0.1, 1e-4),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_profile_carries_the_numbers_of_the_paper(name: str, params_path: Path) -> None:
    params = lay(name, params_path)
    quantize, finetune = params.quantize, params.finetune
    found = (params.model.source, quantize.bits, quantize.lr_theta, quantize.decay_theta)
    assert (*found, quantize.lr_adapter, quantize.decay_adapter, finetune.learning_rate) == TABLE[name]
    assert (quantize.method, quantize.group_size, quantize.rank, quantize.epochs) == ("apiq-bw", 64, 64, 20)
    assert (quantize.batch_size, quantize.alpha, quantize.symmetric) == (1, 16.0, False)
    assert (params.calibration.corpus, params.calibration.join) == ("wikitext2", "\n\n")
    assert (params.calibration.windows, params.calibration.length) == (128, 2048)
    assert (finetune.epochs, finetune.batch_size * finetune.accumulation, finetune.length) == (3, 64, 1024)
    assert (finetune.weight_decay, finetune.schedule, finetune.warmup) == (0.1, "cosine", 0.03)
    texts = params.evaluate.perplexity
    assert set(texts) == {"wikitext2", "c4"}
    assert (texts["c4"].windows, texts["c4"].length, texts["wikitext2"].windows) == (256, 2048, 0)
    assert len(params.model.revision or "") == 40


def test_there_are_profiles_and_each_says_what_it_is(params_path: Path) -> None:
    assert {*TABLE, "ci"} <= set(PROFILES)
    assert all(len(line) > 20 for line in known_profiles(params_path).values())


@pytest.mark.parametrize("name", PROFILES)
def test_nothing_of_earlier_profiles_stays(name: str, params_path: Path) -> None:
    fresh = params_path.read_text()
    alone = _decisive(lay(name, params_path))
    params_path.write_text(fresh)
    for other in PROFILES:
        lay(other, params_path)
    assert _decisive(lay(name, params_path)) == alone


def _decisive(params: Params) -> dict:
    values = params.model_dump()
    if params.model.source != "demo":
        del values["model"]["demo"]
    return values


def test_comments_and_everything_else_stay(params_path: Path) -> None:
    before = params_path.read_text().splitlines()
    change({"quantize.bits": 3, "evaluate.perplexity.demo.windows": 7}, params_path)
    after = params_path.read_text().splitlines()
    different = [(old.split("#"), new.split("#")) for old, new in zip(before, after, strict=True) if old != new]
    assert [(old[0].strip(), new[0].strip()) for old, new in different] == [
        ("bits: 2", "bits: 3"),
        ("windows: 0", "windows: 7"),
    ]
    assert all(old[1] == new[1] for old, new in different)


def test_a_profile_replaces_the_table_of_corpora(params_path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("evaluate:\n  perplexity:\n    own: {text: 'demo:test', length: 100}\n")
    assert set(lay(tmp_path / "mine.yaml", params_path).evaluate.perplexity) == {"own"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("quantize: {bits: 9}", "quantize.bits is 9"),
        ("quantize: {bit: 3}", "quantize.bit is not a parameter; did you mean bits?"),
        ("quantize: {rank: 1000}", "quantize.rank is 1000; it should be at most"),
        ("quantize: 3", "quantize is 3; it should be a section"),
        ("- a\n- b\n", "holds no sections"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_cannot_be_run_changes_nothing(content: str, told: str, params_path: Path, tmp_path: Path) -> None:
    before = params_path.read_bytes()
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ApiqError) as caught:
        lay(tmp_path / "mine.yaml", params_path)
    assert told in str(caught.value)
    assert params_path.read_bytes() == before


def test_an_unknown_profile_is_answered_with_the_known_ones(params_path: Path) -> None:
    with pytest.raises(ApiqError, match=r"no profile llama2-7b-2bits in .*; did you mean llama2-7b-2bit\?"):
        lay("llama2-7b-2bits", params_path)
    with pytest.raises(ApiqError, match="known are ci, "):
        lay("zzz", params_path)
    with pytest.raises(ApiqError, match=r"there is no file nothing\.yaml"):
        lay("nothing.yaml", params_path)


@pytest.mark.parametrize("key", ["bits", "", "quantize.", ".bits"])
def test_a_change_needs_section_and_key(key: str, params_path: Path) -> None:
    with pytest.raises(ApiqError, match=r"not of the form section\.key"):
        change({key: 3}, params_path)
