"""The stage evaluate on the outs of a small pipeline: what stands beside the quantized model, and what is kept."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.calibration import store
from apiq.checkpoint import skipped
from apiq.checkpoint.accounting import effective_bits
from apiq.evaluation import run as evaluation
from apiq.models.source import fetch
from apiq.params import ModelParams, parse
from apiq.progress import silent
from apiq.quantization import quantize
from apiq.refinement.run import refine
from stages import evaluate

WORDS = {f"w{number}": number for number in range(40)}
BUDGET = {"method": "gptq-lora", "rank": 4, "target_bits": 3.7, "candidate_group_sizes": [16, 32],
          "candidate_ranks": [1, 3, 6], "device": "cpu"}  # fmt: skip


@pytest.fixture
def params(tmp_path, monkeypatch):
    """The parameters of a run whose outs up to finetuned/ are in data/ of the current directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("original")
    words = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained("original")
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 37}" for number in range(200)))
    fetch(ModelParams(source="original"), "data/model")
    windows = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    store.write("data/calibration", windows, {})
    text = {"text": "text.txt", "windows": 4, "length": 8}
    chosen = parse({
        "quantize": BUDGET,
        "refine": {"epochs": 1, "generated": 0, "adapter_bits": 8, "device": "cpu"},
        "finetune": {"task": "none"},
        "evaluate": {"perplexity": {"words": text}, "tasks": [], "error_windows": 2, "device": "cpu"},
    })  # fmt: skip
    quantize("data/model", windows, chosen.quantize, "data/quantized")
    refine("data/quantized", "data/model", windows, chosen.refine, "data/refined")
    skipped.write("data/quantized", "data/finetuned")
    return chosen


def test_every_model_has_its_own_bits_and_rounding_shares_the_divided_grids(params, tmp_path):
    evaluate.main(params, silent)
    found = json.loads((tmp_path / "data/metrics.json").read_text())
    assert sorted(found) == ["effective_bits", "full", "quantized", "refined", "rtn"]
    quantized = effective_bits("data/quantized")
    assert found["quantized"]["effective_bits"] == found["effective_bits"] == quantized.total
    assert found["refined"]["effective_bits"] == effective_bits("data/refined").total < quantized.total
    assert found["rtn"]["effective_bits"] == pytest.approx(quantized.total - quantized.adapters)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        ["model", "calibration", "quantized", "refined", "finetuned", "evaluation", "metrics.json"]
    )
    assert not any((tmp_path / ".apiq_work").iterdir())


def test_a_run_that_stopped_goes_on_after_the_models_that_are_done(params, tmp_path, monkeypatch):
    measured, original = [], evaluation._Bench.measure

    def measure(self, model, tokenizer, progress):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(model)
        return original(self, model, tokenizer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation._Bench, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(params, silent)
    assert not (tmp_path / "data/evaluation").exists()
    monkeypatch.setattr(evaluation._Bench, "measure", lambda *given: measured.append(given) or original(*given))
    evaluate.main(params, silent)
    assert len(measured) == 4
    resumed = (tmp_path / "data/metrics.json").read_bytes()
    evaluate.main(params, silent)
    assert len(measured) == 8, "what is done leaves nothing behind to be taken up"
    assert (tmp_path / "data/metrics.json").read_bytes() == resumed
