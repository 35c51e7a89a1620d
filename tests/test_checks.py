import json
from pathlib import Path

import pytest

from apiq.checks import check, known_config
from apiq.errors import ApiqError
from apiq.overrides import override, read_yaml
from apiq.params import ModelParams, Params, parse

ROOT = Path(__file__).parents[1]
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def changed(*assignments: str) -> Params:
    return parse(override(read_yaml(ROOT / "params.yaml"), ["evaluate.task_folder=null", *assignments]))


def refusal(*assignments: str, config: dict | None = None) -> str:
    params = changed(*assignments)
    with pytest.raises(ApiqError) as caught:
        check(params, config or known_config(params.model))
    return str(caught.value)


def test_the_demo_can_be_run() -> None:
    check(changed(), known_config(ModelParams()))


def test_options_that_the_adapter_does_not_have_are_refused() -> None:
    assert refusal("quantize.adapter_options={foo: 1}").startswith("quantize.adapter_options.foo is no option of PEFT")
    check(changed("quantize.adapter_options={use_dora: true}"), None)


@pytest.mark.parametrize("layers", [{"num_hidden_layers": 2}, {"n_layer": 2}, {"text_config": {"num_layers": 2}}])
def test_a_block_that_the_model_does_not_have_is_not_drawn(layers: dict) -> None:
    for block in (2, -3):
        told = f"report.histogram_block is {block}; it should be 0 to 1, or -1 to -2 counted from the last, the blocks"
        assert refusal(f"report.histogram_block={block}", config=layers).startswith(told)
    for block in (1, -2):
        check(changed(f"report.histogram_block={block}"), layers)


DEMO = ModelParams().demo
NARROWEST = DEMO.hidden_size // DEMO.heads * DEMO.kv_heads


@pytest.mark.parametrize(
    ("key", "bound"),
    [
        ("quantize.rank", NARROWEST),
        ("quantize.group_size", DEMO.intermediate_size),
        ("calibration.length", DEMO.context),
        ("finetune.length", DEMO.context),
        ("evaluate.perplexity.demo.length", DEMO.context),
    ],
)
def test_what_the_model_does_not_take_is_refused_and_the_bound_itself_is_not(key: str, bound: int) -> None:
    assert refusal(f"{key}={bound + 1}").startswith(f"{key} is {bound + 1}; it should be at most {bound}, ")
    at_the_bound = changed(f"{key}={bound}")
    check(at_the_bound, known_config(at_the_bound.model))


@pytest.mark.parametrize("bare", ["quantize.method=rtn", "quantize.adapter=none"])
def test_what_has_no_adapters_is_not_finetuned(bare: str) -> None:
    told = refusal(bare, "quantize.rank=4096")
    assert "leaves no adapters to finetune; set finetune.task to none" in told
    assert "leaves no adapters to refine; set refine.epochs to 0" in refusal(bare, "finetune.task=none")
    for alone in ("refine.epochs=0", "refine.lr_scales=0.001"):
        without = changed(bare, "quantize.rank=4096", "finetune.task=none", alone)
        check(without, known_config(without.model))


def test_only_adapters_everywhere_are_held_to_the_smallest_side(tmp_path: Path) -> None:
    """Two narrow heads of keys and values carry none where the feed-forward part alone is adapted."""
    narrow = LLAMA | {"num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(narrow))
    side = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    wide = [f"model.source={tmp_path}", f"quantize.rank={2 * side}"]
    assert f"it should be at most {side}" in refusal(*wide)
    check(changed(*wide, "quantize.adapter_targets=[ffn]"), narrow)


def test_a_width_that_gpt2_leaves_empty_is_four_times_the_other() -> None:
    gpt2 = {"n_embd": 768, "n_head": 12, "n_inner": None}
    check(changed("quantize.group_size=3072"), gpt2)
    with pytest.raises(ApiqError, match="at most 3072, the widest row"):
        check(changed("quantize.group_size=3073"), gpt2)


def test_data_of_a_finetuning_that_is_not_done_need_not_be_there() -> None:
    without = changed("finetune.task=none", "finetune.text=gone.txt", "finetune.length=4096")
    check(without, known_config(without.model))


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (LLAMA, 1024),
        (LLAMA | {"head_dim": 64}, 512),
        ({"text_config": LLAMA}, 1024),
        ({"n_embd": 768, "n_head": 12, "n_positions": 1024}, 768),
    ],
)
def test_smallest_side_of_a_linear_is_read_from_any_family(config: dict, rank: int) -> None:
    check(changed(f"quantize.rank={rank}"), config)
    assert f"it should be at most {rank}," in refusal(f"quantize.rank={rank + 1}", config=config)


@pytest.mark.parametrize("alias", ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"])
def test_context_goes_by_many_names(alias: str) -> None:
    assert "at most 100, the context" in refusal("calibration.length=101", config={alias: 100})


def test_a_model_that_is_not_known_yet_is_not_held_against_the_parameters() -> None:
    check(changed("quantize.rank=100000", "calibration.length=100000"), None)


@pytest.mark.parametrize(
    ("assignments", "told"),
    [
        (["model.source=./nothing"], "model.source is ./nothing; it should be demo, a folder that is there, or a name"),
        (["model.source=apiq"], "model.source is apiq; it should be a folder with the config.json"),
        (["model.source=owner/model"], "model.revision is empty; owner/model is no folder here"),
        (["model.revision=main"], "model.revision is main; it should be empty for the demo model."),
        (["calibration.corpus=wikitext"], "calibration.corpus is 'wikitext'; it should be a .txt, .jsonl or .parquet"),
        (["calibration.corpus=pyproject.toml"], "calibration.corpus is 'pyproject.toml'; it should be a .txt"),
        (["calibration.corpus=c4:test"], "calibration.corpus is c4:test; it should be c4, or one split of it: c4:"),
        (["calibration.mixture=[c4, wikitext]"], "a corpus of calibration.mixture is 'wikitext'; it should be a .txt"),
        (["calibration.mixture=['demo:test']"], "a corpus of calibration.mixture is demo:test, on which evaluate."),
        (["finetune.text=t.bin"], "finetune.text is 't.bin'; it should be a .txt"),
        (["finetune.task=instruction", "finetune.pairs=p.jsonl"], "finetune.pairs is 'p.jsonl'; it should be a .jsonl"),
        (["evaluate.perplexity.demo.text=x.txt"], "evaluate.perplexity.demo.text is 'x.txt'; it should be a .txt"),
        (["evaluate.task_folder=nothing"], "evaluate.task_folder is nothing; it should be a folder that is there"),
        (["calibration.corpus=demo:test"], "calibration.corpus is demo:test, on which evaluate.perplexity.demo"),
        (["evaluate.perplexity.demo.text=demo:train"], "calibration.corpus is demo, on which evaluate.perplexity.demo"),
        (["finetune.task=lm", "finetune.text=demo:test"], "finetune.text is demo:test, on which evaluate"),
    ],
)
def test_what_is_not_there_or_not_apart_is_refused(assignments: list[str], told: str) -> None:
    assert refusal(*assignments).startswith(told)


def test_the_reported_split_of_a_corpus_is_the_one_evaluated() -> None:
    assert "on which" in refusal("calibration.corpus=c4:validation", "evaluate.perplexity.demo.text=c4")
    check(changed("calibration.corpus=c4", "evaluate.perplexity.demo.text=c4"), None)


def test_the_same_file_is_recognised_by_another_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    roundabout = tmp_path / "." / ".." / tmp_path.name / "a.txt"
    same = [f"calibration.corpus={tmp_path / 'a.txt'}", f"evaluate.perplexity.demo.text={roundabout}"]
    assert "it should be another corpus" in refusal(*same)


def test_a_local_model_is_known_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert known_config(ModelParams(source=str(tmp_path))) == LLAMA
    assert "at most 1024" in refusal(f"model.source={tmp_path}", "quantize.rank=1025")


def test_a_hub_model_is_known_from_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--owner--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert known_config(ModelParams(source="owner/model", revision=commit)) == LLAMA
    assert known_config(ModelParams(source="owner/other", revision=commit)) is None
