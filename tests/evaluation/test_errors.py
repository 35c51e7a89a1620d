"""Errors of weights and activations against a brute-force computation on whole models in memory."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from apiq.checkpoint.loading import Loaded, full_precision, load
from apiq.errors import ApiqError
from apiq.evaluation.errors import Errors, compare_errors, errors, summary, write_errors
from apiq.evaluation.side_by_side import BLOCK
from apiq.params import EvaluateParams, EvaluationText, QuantizeParams
from apiq.quantization import quantize

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "initializer_range": 0.3, "num_hidden_layers": 3,
}  # fmt: skip
LINEARS = 7


def save(model, folder):
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 40, (5, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random Llama in full precision, by LoftQ with adapters that act times alpha / r = 2, and rounded."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models")
    save(LlamaForCausalLM(LlamaConfig(**SHAPE)), place / "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APIQ_WORK", str(tmp_path_factory.mktemp("work")))
        for method in ("loftq", "rtn"):
            params = QuantizeParams(method=method, bits=2, group_size=16, rank=4, alpha=8.0, device="cpu")
            quantize(place / "full", None, params, place / method)
    return place


@pytest.fixture(scope="module")
def rows(folders, windows):
    original, loaded = full_precision(folders / "full", torch.float32).stream, load(folders / "loftq", device="cpu")
    return list(errors(original, loaded, windows, batch_size=2))


def outputs(model, blocks, windows, inputs=None):
    """The output of every linear and block of a whole model in one forward, and the input of every block.

    With `inputs` each block is given these instead of what the block before made.
    """
    seen, entered, hooks = {}, {}, []
    for index, block in enumerate(blocks):

        def enter(_module, args, kwargs, index=index):
            entered[index] = args[0]
            return (args if inputs is None else (inputs[index], *args[1:])), kwargs

        def leave(_module, _inputs, output, key=(index, BLOCK)):
            seen[key] = output[0] if isinstance(output, tuple) else output

        hooks += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        for name in [name for name, _ in block.named_modules() if name.endswith("_proj")]:
            hooks.append(
                block.get_submodule(name).register_forward_hook(
                    lambda _module, _inputs, output, key=(index, name): seen.__setitem__(key, output)
                )
            )
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen, entered


def per_token(difference):
    return float(difference.double().square().sum(-1).sqrt().mean())


def test_activation_errors_are_those_of_two_whole_models(folders, windows, rows):
    full = LlamaForCausalLM.from_pretrained(folders / "full").eval()
    quantized = load(folders / "loftq", device="cpu").model
    targets, inputs = outputs(full, full.model.layers, windows)
    blocks = quantized.get_base_model().model.layers
    accumulated, _ = outputs(quantized, blocks, windows)
    own, _ = outputs(quantized, blocks, windows, inputs)
    assert {(row.block, row.linear) for row in rows} == targets.keys()
    assert len(rows) == len(targets)
    assert [row.linear for row in rows[:2]] == [BLOCK, "self_attn.q_proj"]
    for row in rows:
        key = (row.block, row.linear)
        assert row.activation_norm == pytest.approx(per_token(targets[key]), rel=1e-5)
        assert row.activation_error_own == pytest.approx(per_token(targets[key] - own[key]), rel=1e-4)
        assert row.activation_error_accumulated == pytest.approx(per_token(targets[key] - accumulated[key]), rel=1e-4)
        if row.block == 0:
            assert row.activation_error_own == row.activation_error_accumulated
        elif row.linear.endswith("q_proj"):
            assert row.activation_error_own != pytest.approx(row.activation_error_accumulated, rel=0.01)


def test_weight_errors_are_those_of_the_deployed_weight(folders, rows):
    full = LlamaForCausalLM.from_pretrained(folders / "full")
    blocks = load(folders / "loftq", device="cpu").model.get_base_model().model.layers
    for row in rows:
        if row.linear == BLOCK:
            assert row.weight_norm is row.weight_error_without is row.weight_error_with is None
            continue
        W = full.model.layers[row.block].get_submodule(row.linear).weight.detach()
        layer = blocks[row.block].get_submodule(row.linear)
        Q, inputs = layer.base_layer.weight, torch.eye(W.shape[1])
        deployed = layer(inputs).detach().T  # what the layer with its adapter does to each unit vector
        assert row.weight_norm == pytest.approx(float(W.norm()), rel=1e-6)
        assert row.weight_error_without == pytest.approx(float((W - Q).norm()), rel=1e-5)
        assert row.weight_error_with == pytest.approx(float((W - deployed).norm()), rel=1e-5)
        assert row.weight_error_with < row.weight_error_without  # what LoftQ is for


def test_the_size_of_a_batch_changes_nothing(folders, windows, rows):
    original, loaded = full_precision(folders / "full", torch.float32).stream, load(folders / "loftq", device="cpu")
    again = list(errors(original, loaded, windows, batch_size=5))
    pairs = zip(rows, again, strict=True)
    assert all(a.activation_error_own == pytest.approx(b.activation_error_own, rel=1e-5) for a, b in pairs)


def test_models_are_compared_on_windows_of_the_first_corpus(folders, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 40}" for number in range(100)))
    text = EvaluationText(text=str(tmp_path / "text.txt"), length=8)
    params = EvaluateParams(perplexity={"text": text}, error_windows=3, batch_size=2, device="cpu")
    steps = []
    models = {"rtn": folders / "rtn", "quantized": folders / "loftq"}
    found = compare_errors(folders / "full", models, params, steps.append)
    assert [step.detail for step in steps[2:4]] == ["rtn: block 3/3", "quantized: block 1/3"]
    first = torch.arange(24).view(3, 8)
    loaded = load(folders / "loftq", device="cpu")
    assert found["quantized"] == list(errors(full_precision(folders / "full").stream, loaded, first, 2))
    assert all(row.weight_error_with is None for row in found["rtn"])
    write_errors(tmp_path / "errors.csv", found)
    with open(tmp_path / "errors.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["model"], row["linear"]) for row in written[:2]] == [
        ("rtn", "block"),
        ("rtn", "self_attn.q_proj"),
    ]
    assert len(written) == 2 * 3 * (LINEARS + 1)
    assert float(written[1]["weight_norm"]) == pytest.approx(found["rtn"][1].weight_norm, rel=1e-5)
    assert written[1]["weight_error_with"] == ""


def test_without_a_corpus_only_weights_are_compared(folders):
    params = EvaluateParams(perplexity={}, device="cpu")
    (found,) = compare_errors(folders / "full", {"rtn": folders / "rtn"}, params).values()
    assert len(found) == 3 * LINEARS
    assert all(row.weight_error_without and row.activation_norm is None for row in found)
    assert set(summary(found)) == {"weight"}


def test_experts_have_weight_errors_only_since_each_model_sends_them_other_tokens(tmp_path, monkeypatch, windows):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **{**SHAPE, "num_hidden_layers": 1}, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=40,
    )  # fmt: skip
    save(Qwen2MoeForCausalLM(config), tmp_path / "full")
    quantize(tmp_path / "full", None, QuantizeParams(method="rtn", bits=4, group_size=16, device="cpu"), tmp_path / "q")
    original = full_precision(tmp_path / "full", torch.float32).stream
    found = {row.linear: row for row in errors(original, load(tmp_path / "q", device="cpu"), windows)}
    experts = [row for name, row in found.items() if ".experts." in name]
    assert len(experts) == 8
    assert all(row.weight_error_without > 0 and row.activation_norm is None for row in experts)
    assert found["mlp.shared_expert.down_proj"].activation_error_own > 0
    assert found[BLOCK].activation_error_own > 0


def test_a_model_that_is_not_quantized_is_refused(folders, windows):
    original, loaded = full_precision(folders / "full").stream, load(folders / "full", device="cpu")
    with pytest.raises(ApiqError, match="is a full model; errors are those of a quantized one"):
        next(errors(original, loaded, windows))


def test_another_model_than_the_quantized_one_was_made_from_is_refused(folders, windows, tmp_path):
    save(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 2})), tmp_path / "fewer")
    save(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 64})), tmp_path / "wider")
    loaded = load(folders / "rtn", device="cpu")
    for name, said in (("fewer", "2 blocks model.layers"), ("wider", r"mlp.gate_proj is \[48, 32\] in .*\[64, 32\]")):
        with pytest.raises(ApiqError, match=f"{said}.*give the model that it was made from"):
            list(errors(full_precision(tmp_path / name).stream, loaded, None))


def test_the_summary_is_the_mean_of_relative_errors():
    found = [
        Errors(0, "a", 2.0, 1.0, 0.5, 4.0, 9.0, 1.0),
        Errors(0, "b", 4.0, 3.0, None, 2.0, 9.0, 1.0),
        Errors(0, BLOCK, None, None, None, 1.0, 9.0, 9.0),
    ]
    assert summary(found) == {"weight": (0.5 / 2 + 3 / 4) / 2, "activation": (1 / 4 + 1 / 2) / 2}
    broken = [Errors(0, "a", 2.0, 1.0, None, 4.0, math.inf, math.inf)]
    assert summary(broken) == {"weight": 0.5}


def test_adapters_of_finetuning_are_not_compared(folders, windows):
    tuned = Loaded(SimpleNamespace(), folders / "loftq", "finetuned")
    with pytest.raises(ApiqError, match="is a finetuned model"):
        next(errors(full_precision(folders / "full").stream, tuned, windows))
